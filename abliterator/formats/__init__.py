"""Storage formats: how the bytes of a tensor become numbers and back.

Number formats have safetensors' names ("BF16"). A `Layout` is that of one tensor: it reads matrices
from the tensor's bytes and writes them back in place. A `Storage` is that of a checkpoint: which
layout each tensor has, and what changes in headers and config when tensors are dequantized. A new
format is an entry of `_storage.SCHEMES` and, if its bits are new, a `Layout`. Files, and what an
edit means, are outside this package.

    storage = storage_of(config)                              # or UnsupportedModel
    layout = storage.layout("model.layers.3.mlp.down_proj.weight", headers)
    for matrix in layout.matrices(buffer, axis=0, scales=layout.scales_from(read)):
        numbers, units = matrix.get(0, 128)                   # [H, c] in units of [H, c]
        matrix.put(0, matrix.rounded(numbers))
"""

from abliterator.formats._layout import Layout, Matrix
from abliterator.formats._measured import Measured, Way, measured, preferred
from abliterator.formats._numbers import (
    FORMATS,
    Format,
    Units,
    format_of,
    mxfp4_blocks,
    mxfp4_numbers,
    mxfp4_rounded,
    mxfp4_scales,
)
from abliterator.formats._packed import PackedLayout
from abliterator.formats._refused import refused, require_known_names
from abliterator.formats._scheme import Header
from abliterator.formats._storage import Dequantized, Storage, storage_of

__all__ = [
    "FORMATS",
    "Dequantized",
    "Format",
    "Header",
    "Layout",
    "Matrix",
    "Measured",
    "PackedLayout",
    "Storage",
    "Units",
    "Way",
    "format_of",
    "measured",
    "mxfp4_blocks",
    "mxfp4_numbers",
    "mxfp4_rounded",
    "mxfp4_scales",
    "preferred",
    "refused",
    "require_known_names",
    "storage_of",
]
