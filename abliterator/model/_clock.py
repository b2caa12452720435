"""A fixed date for chat templates, since prompts must not change from day to day."""

from __future__ import annotations

# 26 July 2024, a Friday, at midnight: the date that Llama 3's template falls back to.
_DIRECTIVES = {
    "a": "Fri", "A": "Friday", "w": "5", "u": "5",
    "b": "Jul", "B": "July", "h": "Jul", "m": "07", "-m": "7",
    "d": "26", "-d": "26", "e": "26", "j": "208", "-j": "208",
    "y": "24", "-y": "24", "Y": "2024", "-Y": "2024", "C": "20", "g": "24", "G": "2024",
    "U": "29", "W": "30", "V": "30",
    "H": "00", "-H": "0", "k": " 0", "I": "12", "-I": "12", "l": "12", "p": "AM", "P": "am",
    "M": "00", "-M": "0", "S": "00", "-S": "0", "f": "000000", "s": "1721952000",
    "z": "", "Z": "", "n": "\\n", "t": "\\t",
    "c": "Fri Jul 26 00:00:00 2024", "x": "07/26/24", "X": "00:00:00", "D": "07/26/24",
    "F": "2024-07-26", "T": "00:00:00", "R": "00:00", "r": "12:00:00 AM",
}  # fmt: skip
_PERCENT = "\ue000"  # replaces %% until all directives are written


def with_fixed_clock(template: str) -> str:
    """The template with a `strftime_now` of one date, in whatever format it asks for.

    A macro, because transformers lets a template see plain data only, never a function of ours. It
    ends in a line of its own, so that what the template starts with is still at a line's start.
    """
    return _MACRO + template if "strftime_now" in template else template


def _macro() -> str:
    pairs = [(f"%{name}", value) for name, value in _DIRECTIVES.items()]
    # Windows says # where others say -
    pairs += [(f"%#{name[1:]}", value) for name, value in _DIRECTIVES.items() if name[0] == "-"]
    written = "".join(f"|replace('{name}', '{value}')" for name, value in pairs)
    text = f"format|replace('%%', '{_PERCENT}'){written}|replace('{_PERCENT}', '%')"
    return "{%- macro strftime_now(format) %}{{ " + text + " }}{% endmacro %}\n"


_MACRO = _macro()
