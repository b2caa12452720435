"""Quantisation methods in which no edit can be stored, and what to use instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from abliterator.errors import UnsupportedModel
from abliterator.files import package_yaml


@cache
def methods() -> Mapping[str, Mapping[str, str]]:
    """Every such method: what its `weights` are, and perhaps a pattern of its tensors' `names`."""
    by_name: Mapping[str, Mapping[str, str]] = package_yaml("abliterator.formats", "refused.yaml")
    return by_name


def refused(
    method: str, settings: Mapping[str, Any] | None = None, made_from: Collection[str] = ()
) -> UnsupportedModel:
    """The error for a checkpoint in a format that no edit can be stored in."""
    known = methods().get(method)
    weights = (
        f"its weights are {known['weights']}" if known else "abliterator does not know its layout"
    )
    suggestion = f", {' or '.join(made_from)} (its card names it)," if made_from else ""
    return UnsupportedModel(
        f"The checkpoint is quantised by {method}{_described(settings or {})}: {weights}, and an "
        "edit is not stored in that: so few levels would put the removed directions back. Edit the "
        f"model that it was made from{suggestion} in bfloat16, or a checkpoint of it in FP8 "
        "(DeepSeek's and Qwen's, or compressed-tensors' float-quantized), and quantise the edited "
        "one again."
    )


def require_known_names(names: Collection[str], made_from: Collection[str] = ()) -> None:
    """Stops at tensors of a refused format, whatever config.json says.

    Older tools left quantization_config out of it.

    Raises:
        UnsupportedModel: naming the format, and the base if it is known.
    """
    for method, known in methods().items():
        if "names" in known and any(map(re.compile(known["names"]).search, names)):
            raise refused(method, made_from=made_from)


def _described(settings: Mapping[str, Any]) -> str:
    keys = ("bits", "quant_algo", "format", "bnb_4bit_quant_type", "load_in_8bit")
    pairs = [f"{key} {settings[key]}" for key in keys if settings.get(key)]
    return f" ({', '.join(pairs)})" if pairs else ""
