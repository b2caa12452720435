"""The formats that a model can be quantised to, by the name that a user gives."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, NamedTuple

from abliterator.errors import RecipeError


class QuantizedFormat(NamedTuple):
    """One format.

    Attributes:
        name: as users and tools write it.
        tool: what quantises to it.
        label: what it stores, in words; {group} is the number of columns that share a scale.
        scheme: preset of compressed-tensors; None of llama.cpp's, whose type is the name.
    """

    name: str
    tool: Literal["compressed-tensors", "llama.cpp"]
    label: str
    scheme: str | None = None


_COMPRESSED = (
    QuantizedFormat("fp8", "compressed-tensors", "FP8 (E4M3), a scale a row", "FP8_DYNAMIC"),
    QuantizedFormat("int8", "compressed-tensors", "int8, a scale for {group} columns", "W8A16"),
    QuantizedFormat("int4", "compressed-tensors", "int4, a scale for {group} columns", "W4A16"),
    QuantizedFormat(
        "nvfp4", "compressed-tensors", "NVFP4 (E2M1), a scale for {group} columns", "NVFP4A16"
    ),
)
# Those that need no calibration (importance matrix).
_GGUF = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "IQ4_XS", "IQ4_NL", "BF16", "F16"),
)

FORMATS = (
    *_COMPRESSED,
    *(QuantizedFormat(name, "llama.cpp", f"GGUF {name}") for name in _GGUF),
)


def formats_named(names: Iterable[str]) -> tuple[QuantizedFormat, ...]:
    """The formats of these names, in any case, each once.

    Raises:
        RecipeError: for a name that is none, and for no name at all.
    """
    by_name = {entry.name.lower(): entry for entry in FORMATS}
    found: dict[str, QuantizedFormat] = {}
    for name in names:
        key = name.strip().lower()
        if key not in by_name:
            close = difflib.get_close_matches(key, by_name, n=1)
            hint = f"did you mean {by_name[close[0]].name}? " if close else ""
            known = ", ".join(entry.name for entry in FORMATS)
            raise RecipeError(f"`--as` names the format {name!r}; {hint}Known are {known}.")
        found[key] = by_name[key]
    if not found:
        raise RecipeError("`--as` names no format; give some, such as fp8,int4,Q4_K_M.")
    return tuple(found.values())
