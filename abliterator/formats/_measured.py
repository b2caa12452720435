"""Measured leak and noise of an edit in each storage format, and the choice that follows.

The figures are those of `python perf/storage_formats.py` (d_model 2048, random weights and
directions, one block); the bake measures its own on the bytes that it stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Way = Literal["keep", "dequantize"]


class Measured(NamedTuple):
    """Leak and noise of an edit of rank k in one storage format.

    Attributes:
        leak: |Qᵀ W'| / |Qᵀ W| of the stored bytes, the largest of all tensors.
        noise: |W' - E| / |W|, E the exact edit.
    """

    leak: float
    noise: float


_KS = (1, 3, 16)


def _by_k(*figures: tuple[float, float]) -> Mapping[int, Measured]:
    return {k: Measured(*pair) for k, pair in zip(_KS, figures, strict=True)}


# By `Layout.kind`, by what becomes of the tensor's format, by k.
MEASURED: Mapping[str, Mapping[Way, Mapping[int, Measured]]] = {
    "FP8, a scale a block": {
        "keep": _by_k((5.8e-5, 0.0178), (2.4e-5, 0.0220), (1.2e-5, 0.0258)),
        "dequantize": _by_k((1.4e-6, 0.0017), (1.0e-6, 0.0017), (5.3e-7, 0.0017)),
    },
    "FP8, a scale a row": {
        "keep": _by_k((5.6e-5, 0.0177), (2.4e-5, 0.0220), (1.3e-5, 0.0260)),
        "dequantize": _by_k((1.4e-6, 0.0017), (1.0e-6, 0.0017), (5.3e-7, 0.0017)),
    },
    "FP8, a scale a tensor": {
        "keep": _by_k((5.7e-5, 0.0178), (2.3e-5, 0.0221), (1.3e-5, 0.0259)),
        "dequantize": _by_k((1.3e-6, 0.0016), (1.0e-6, 0.0017), (5.2e-7, 0.0017)),
    },
    "MXFP4": {
        "keep": _by_k((3.9e-3, 0.0454), (3.5e-3, 0.0642), (5.1e-3, 0.0848)),
        "dequantize": _by_k((2.6e-6, 0.0016), (9.4e-7, 0.0016), (4.6e-7, 0.0016)),
    },
}

# What the format itself rounded away of the weights it was made from: |W - original| / |original|.
OWN_NOISE: Mapping[str, float] = {
    **dict.fromkeys((kind for kind in MEASURED if kind.startswith("FP8")), 0.0265),
    "MXFP4": 0.1159,
}

# Above this share of the directions left, an edit in the format is no longer the requested edit: it
# is what plain rounding to bfloat16 leaves, 6e-3 at k = 1, and a little more.
LEAK_LIMIT = 1e-2


def measured(kind: str, way: Way, k: int) -> tuple[int, Measured]:
    """The figures for the smallest k measured that is at least k, or the largest; and that k."""
    by_k = MEASURED[kind][way]
    rank = min((measured_k for measured_k in by_k if measured_k >= k), default=max(by_k))
    return rank, by_k[rank]


def preferred(kind: str) -> Way:
    """What `edit.quantized: auto` does with tensors of this kind (`Layout.kind`).

    A format is kept while every leak measured of it is below `LEAK_LIMIT`, and the noise that
    keeping adds below what the format itself costs.

    Behaviour agrees, for both formats: KL of the first token from the exact edit, which
    `dequantize` is to 1e-4, against KL of the quantised base from the unquantised model, is 0.0037
    [0.0032, 0.0043] against 0.030 in FP8 blocks, and 0.024 [0.022, 0.026] against 0.46 in MXFP4
    (perf/storage_behaviour.py, SmolLM2-135M-Instruct, 72 prompts of each set). In MXFP4 that
    is half of the edit's own 0.050, and bfloat16 takes 3.8 times the bytes: who has them should
    dequantize. Declines do not distinguish the two there (FP8 4, 6 and 7 of 72 for keep, dequantize
    and plain rounding; MXFP4 0 for all), nor is KL an argument against plain rounding, which moves
    less (0.0032, 0.014): what compensation gains is that the edit is the requested one.
    """
    if kind not in MEASURED:  # plain numbers are kept as they are
        return "keep"
    figures = MEASURED[kind]["keep"].values()
    fits = all(m.leak <= LEAK_LIMIT and m.noise <= OWN_NOISE[kind] for m in figures)
    return "keep" if fits else "dequantize"
