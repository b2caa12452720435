"""Regular expressions that a checkpoint brings, in bounded time.

Some need longer than any user would wait, on names of a few dozen characters; `re` cannot be
interrupted.
"""

from __future__ import annotations

from abliterator.errors import UnsupportedModel

_SECONDS = 1.0  # a sound pattern needs microseconds for a name


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches at the start of a name, as by `re.match`; what is none does not.

    Raises:
        UnsupportedModel: for a pattern that takes longer than a second.
    """
    import regex

    try:
        return regex.match(pattern, name, timeout=_SECONDS) is not None
    except regex.error:
        return False
    except TimeoutError as error:
        raise UnsupportedModel(
            f"config.json has a pattern of modules, {pattern[:80]!r}, that takes more than "
            f"{_SECONDS:g} second for the name {name[:80]!r}. One that is matched at once was "
            "expected: correct quantization_config, or use the model in bfloat16."
        ) from error
