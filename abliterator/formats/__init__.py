"""How stored tensors become numbers and back: the storage formats that an edit can be kept in.

The room knows bit layouts and what quantisers call things, not files and not what an edit means.
Names of number formats are safetensors' own ("BF16"). A `Layout` is one tensor's: matrices are got
from its bytes and put back in place. A `Storage` is a checkpoint's: which layout each tensor has,
and what must change in headers and config when tensors are written as plain numbers instead. A new
format is an entry of `_storage.SCHEMES` and, if its bits are new, a `Layout`.

    storage = storage_of(config)                              # or UnsupportedModel
    layout = storage.layout("model.layers.3.mlp.down_proj.weight", headers)
    for matrix in layout.matrices(buffer, axis=0, scales=scales):
        numbers, scale = matrix.get(0, 128)                   # [H, c] in units of [H, c]
        matrix.put(0, matrix.rounded(numbers))
"""

from abliterator.formats._layout import DENSE, Layout, Matrix, PlainLayout, residual_first
from abliterator.formats._measured import MEASURED, OWN_NOISE, Measured, Way, measured, preferred
from abliterator.formats._numbers import (
    F8_E4M3,
    FORMATS,
    MXFP4_STEPS,
    Format,
    format_of,
    mxfp4_blocks,
    mxfp4_numbers,
    mxfp4_rounded,
    mxfp4_scales,
)
from abliterator.formats._refused import REFUSED, refused, require_known_names
from abliterator.formats._storage import SCHEMES, SETTINGS, Dequantized, Header, Storage, storage_of

__all__ = [
    "DENSE",
    "F8_E4M3",
    "FORMATS",
    "MEASURED",
    "MXFP4_STEPS",
    "OWN_NOISE",
    "REFUSED",
    "SCHEMES",
    "SETTINGS",
    "Dequantized",
    "Format",
    "Header",
    "Layout",
    "Matrix",
    "Measured",
    "PlainLayout",
    "Storage",
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
    "residual_first",
    "storage_of",
]
