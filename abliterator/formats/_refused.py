"""Quantisation methods in which no edit can be stored, and what to use instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
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
    return UnsupportedModel(
        f"The checkpoint is quantised by {method}{_described(settings or {})}: {weights}, and no "
        f"edit is stored in that. {_instead(made_from)}"
    )


def require_known_names(
    names: Collection[str],
    owner: Callable[[str], str],
    made_from: Collection[str] = (),
) -> None:
    """Stops at tensors of a quantisation method that config.json does not say, or beside another.

    Older tools left quantization_config out of it.

    Args:
        names: of all tensors.
        owner: the weight that a tensor of the stated method belongs to; of any other, its own name.
        made_from: ids of the model that the checkpoint's card says it was made from.

    Raises:
        UnsupportedModel: naming the format, and the base if it is known.
    """
    for method, known in methods().items():
        pattern = re.compile(known.get("names", "$^"))
        name = next((n for n in names if pattern.search(n) and owner(n) == n), None)
        if name is not None:
            raise UnsupportedModel(
                f"The checkpoint is quantised by {method}, as its tensor {name} shows, and "
                "quantization_config of config.json does not say so: how its numbers are to be "
                f"read is not known. {_instead(made_from)}"
            )


def _instead(made_from: Collection[str]) -> str:
    suggestion = f", {' or '.join(made_from)} (its card names it)," if made_from else ""
    return (
        f"Edit the model that it was made from{suggestion} in bfloat16, or a checkpoint of it in "
        "FP8 (DeepSeek's and Qwen's, or compressed-tensors' float-quantized), and quantise the "
        "edited one again."
    )


def _described(settings: Mapping[str, Any]) -> str:
    keys = ("bits", "quant_algo", "format", "bnb_4bit_quant_type", "load_in_8bit")
    pairs = [f"{key} {settings[key]}" for key in keys if settings.get(key)]
    return f" ({', '.join(pairs)})" if pairs else ""
