"""A checkpoint rounded to nearest into a format of compressed-tensors, and the numbers of it.

The files are those that vLLM and transformers read. Scales are the largest size of what shares one,
over the largest number of the format; nothing is calibrated.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from abliterator.checkpoint import Checkpoint
from abliterator.errors import QuantizationError
from abliterator.formats import storage_of
from abliterator.survival._folder import WeightFolder, copy_beside
from abliterator.survival._formats import QuantizedFormat

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "compressed-tensors"
# Columns that share a scale: the first that divides every matrix.
_GROUPS = {"group": (128, 64, 32), "tensor_group": (16,)}
_LAYOUTS = {"group": "pack-quantized", "tensor_group": "nvfp4-pack-quantized"}
_IN_A_BLOCK = re.compile(r"\.\d+\.")
# Small matrices of a block that quantisers leave alone: routers, gates, convolutions.
_LEFT = re.compile(r"(^|[._])(router|gate|norm|conv\w*|embed\w*)\.weight$|shared_expert_gate")


class Rounding(NamedTuple):
    """How one model is rounded to a format.

    Attributes:
        scheme: of compressed-tensors.
        compressor: class of compressed-tensors that packs and unpacks.
        layout: the format's name in config.json.
        label: in words.
    """

    scheme: Any
    compressor: Any
    layout: str
    label: str


def require_package() -> str:
    """The package with its version.

    Raises:
        QuantizationError: if it is not installed.
    """
    try:
        return f"{PACKAGE} {version(PACKAGE)}"
    except PackageNotFoundError:
        raise QuantizationError(
            f"Formats such as fp8 and int4 are made by the package {PACKAGE}, which is not "
            "installed: pip install 'abliterator[survive]'."
        ) from None


def require_plain(source: Checkpoint) -> None:
    """Raises QuantizationError for a checkpoint that is quantised already."""
    if storage_of(source.config).settings:
        raise QuantizationError(
            f"{source.folder} is stored quantised already, and what quantisation leaves of an "
            "edit is measured from 16 or 32 bits. Build the edit of the model's bfloat16 "
            "checkpoint, or with `edit.quantized: dequantize` of all of it."
        )


def rounding_of(source: Checkpoint, entry: QuantizedFormat) -> Rounding:
    """How a model is rounded to a format of compressed-tensors.

    Raises:
        QuantizationError: for a model without matrices that it would round, or whose columns no
            group divides.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    widths = {info.shape[-1] for name, info in source.tensors.items() if _is_rounded(name, info)}
    if not widths:
        raise QuantizationError(
            f"{source.folder} has no matrix in its blocks that {entry.name} would round."
        )
    scheme = preset_name_to_scheme(str(entry.scheme), ["Linear"])
    strategy, group = scheme.weights.strategy, None
    if strategy in _GROUPS:
        sizes = _GROUPS[strategy]
        group = next((g for g in sizes if not any(width % g for width in widths)), None)
        if group is None:
            raise QuantizationError(
                f"{entry.name} has one scale for {sizes[-1]} columns or more, and matrices of "
                f"{source.folder} have {', '.join(map(str, sorted(widths)))}, which no such group "
                "divides. Leave it out of `--as`; a GGUF format may fit."
            )
        scheme.weights.group_size = group
    layout = _LAYOUTS.get(strategy, "float-quantized")
    compressor = BaseCompressor.get_value_from_registry(layout)
    return Rounding(scheme, compressor, layout, entry.label.format(group=group))


def write_rounded(source: Checkpoint, rounding: Rounding, quantized: Path, numbers: Path) -> int:
    """Writes a model in the format, and beside it one with the numbers that loaders decode.

    Args:
        source: the model.
        rounding: from `rounding_of` it, or its base.
        quantized: folder to be made, of the format.
        numbers: folder to be made, with the names, shapes and dtypes of `source`.

    Returns:
        Bytes of the weight files in the format.
    """
    from safetensors.torch import load_file

    left = [
        name.removesuffix(".weight")
        for name, info in source.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and not _is_rounded(name, info)
    ]
    scheme = rounding.scheme.model_dump(mode="json", exclude_none=True)
    settings = {
        "quant_method": PACKAGE,
        "format": rounding.layout,
        "quantization_status": "compressed",
        "ignore": sorted({*left, "lm_head"}),
        "config_groups": {"group_0": {**scheme, "format": rounding.layout}},
    }
    copy_beside(source, quantized, {"quantization_config": settings})
    copy_beside(source, numbers)
    packed, decoded = WeightFolder(quantized), WeightFolder(numbers)
    for file in source.weight_files:
        plain, stored = load_file(source.folder / file), {}
        for name, weight in plain.items():
            if not _is_rounded(name, source.tensors[name]):
                stored[name] = weight
                continue
            parts = _rounded(weight, rounding)
            prefix = name.removesuffix("weight")
            stored |= {f"{prefix}{part}": tensor for part, tensor in parts.items()}
            units = rounding.compressor.decompress(parts, rounding.scheme)["weight"]
            plain[name] = units.to(weight.dtype)
        packed.write(file, stored)
        decoded.write(file, plain)
    packed.close()
    decoded.close()
    return packed.n_bytes


def _rounded(weight: Tensor, rounding: Rounding) -> dict[str, Tensor]:
    """The parts that are stored of one matrix [out, in], by the ends of their names."""
    import torch
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    settings, numbers = rounding.scheme.weights, weight.float()
    sharing = numbers.unsqueeze(-2)  # one scale a row
    if settings.group_size is not None:
        sharing = numbers.reshape(len(numbers), -1, settings.group_size)
    lowest, highest = sharing.amin(-1), sharing.amax(-1)
    if settings.strategy == "tensor_group":  # its scales are FP8, in units of one for the tensor
        unit = generate_gparam(lowest.amin(), highest.amax())
        scale, _ = calculate_qparams(lowest, highest, settings, unit)
        parts = {"weight": numbers, "weight_scale": scale, "weight_global_scale": unit}
        return dict(rounding.compressor.compress(parts, rounding.scheme))
    scale, _ = calculate_qparams(lowest, highest, settings)
    # the nearest is sought on the scale as it is stored
    scale = scale.to(weight.dtype if weight.dtype != torch.float16 else torch.float32)
    parts = {"weight": numbers, "weight_scale": scale.float()}
    return {**rounding.compressor.compress(parts, rounding.scheme), "weight_scale": scale}


def _is_rounded(name: str, info: Any) -> bool:
    """Whether quantisers round this tensor: a linear weight of a block."""
    is_matrix = len(info.shape) == 2 and name.endswith(".weight")
    return bool(is_matrix and _IN_A_BLOCK.search(name) and not _LEFT.search(name))
