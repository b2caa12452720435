"""Quantisation methods in which no edit can be stored, and what to use instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from abliterator.errors import UnsupportedModel


class Refused(NamedTuple):
    """One such method: what its weights are, and a pattern of its tensors' names."""

    weights: str
    names: re.Pattern[str]


_NEVER = re.compile("(?!)")

REFUSED: Mapping[str, Refused] = {
    "gptq": Refused("integers of 2 to 8 bits, packed (GPTQ)", re.compile(r"\.g_idx$")),
    "awq": Refused("integers of 4 bits, packed (AWQ)", re.compile(r"\.qzeros$")),
    "auto-round": Refused("integers of 2 to 8 bits, packed (AutoRound)", _NEVER),
    "bitsandbytes": Refused(
        "of 4 or 8 bits, as bitsandbytes packs them",
        re.compile(r"\.(SCB|weight\.(absmax|quant_map|quant_state\.bitsandbytes__\w+))$"),
    ),
    "modelopt": Refused(
        "in a format of NVIDIA ModelOpt (NVFP4 or FP8)", re.compile(r"\.weight_scale_2$")
    ),
    "nvfp4": Refused("NVFP4, 4 bits with scales in FP8", _NEVER),
    "compressed-tensors": Refused(
        "in a format of compressed-tensors that is not FP8 (integers, NVFP4 or sparse)",
        re.compile(r"\.weight_(packed|global_scale)$"),
    ),
    "fbgemm_fp8": Refused("FP8 for FBGEMM's kernels", _NEVER),
    "gguf": Refused("blocks of GGUF", _NEVER),
}


def refused(
    method: str, settings: Mapping[str, Any] | None = None, made_from: Collection[str] = ()
) -> UnsupportedModel:
    """The error for a checkpoint in a format that no edit can be stored in."""
    entry = REFUSED.get(method)
    weights = (
        f"its weights are {entry.weights}" if entry else "abliterator does not know its layout"
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
    for method, entry in REFUSED.items():  # GPTQ before AWQ, whose names it has too
        if any(map(entry.names.search, names)):
            raise refused(method, made_from=made_from)


def _described(settings: Mapping[str, Any]) -> str:
    keys = ("bits", "quant_algo", "format", "bnb_4bit_quant_type", "load_in_8bit")
    pairs = [f"{key} {settings[key]}" for key in keys if settings.get(key)]
    return f" ({', '.join(pairs)})" if pairs else ""
