"""Measured leak and noise of an edit in each storage format, and the choice that follows.

The figures are in measured.yaml; the bake measures its own on the bytes that it stored.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

from abliterator.files import package_yaml

Way = Literal["keep", "dequantize"]


class Measured(NamedTuple):
    """Leak and noise of an edit of rank k in one storage format.

    Attributes:
        leak: |Qᵀ W'| / |Qᵀ W| of the stored bytes, the largest of all tensors.
        noise: |W' - E| / |W|, E the exact edit.
    """

    leak: float
    noise: float


# Above this share of the directions left, an edit in the format is no longer the requested edit: it
# is what plain rounding to bfloat16 leaves, 6e-3 at k = 1, and a little more.
LEAK_LIMIT = 1e-2

# Noise that is small whatever the format's own is: less than half of what FP8 costs. Integers of 8
# bits cost hardly more than that to begin with, so a second rounding of them is above the first.
SMALL_NOISE = 1e-2


def measured(kind: str, way: Way, k: int) -> tuple[int, Measured] | None:
    """The smallest k measured that is at least k, or the largest, and its figures.

    None for a kind (`Layout.kind`) of which nothing was measured.
    """
    if kind not in figures():
        return None
    by_k = figures()[kind][way]
    rank = min((measured_k for measured_k in by_k if measured_k >= k), default=max(by_k))
    return rank, Measured(*by_k[rank])


def preferred(kind: str) -> Way:
    """What `edit.quantized: auto` does with tensors of this kind (`Layout.kind`).

    A format is kept while every leak measured of it is below `LEAK_LIMIT`, and the noise that
    keeping adds below what the format itself costs, or small.

    Behaviour agrees, for both formats: KL of the first token from the exact edit, which
    `dequantize` is to 1e-4, against KL of the quantised base from the unquantised model, is 0.0037
    [0.0032, 0.0043] against 0.030 in FP8 blocks, and 0.024 [0.022, 0.026] against 0.46 in MXFP4
    (perf/storage_behaviour.py, SmolLM2-135M-Instruct, 72 prompts of each set). In MXFP4 that
    is half of the edit's own 0.050, and bfloat16 takes 3.8 times the bytes: who has them should
    dequantize. Declines do not distinguish the two there (FP8 4, 6 and 7 of 72 for keep, dequantize
    and plain rounding; MXFP4 0 for all), nor is KL an argument against plain rounding, which moves
    less (0.0032, 0.014): what compensation gains is that the edit is the requested one.

    Packed formats are alike, on the same model: 0.0022 against 0.0045 in int8 by rows, 0.030
    against 0.44 in NVFP4, 0.045 against 0.40 in int4 by groups of 32, and at worst 0.10 against
    1.11 in int4 by rows, where the edit's own is 0.040 (docs/edits.md has the table).
    """
    if kind not in figures():  # plain numbers are kept as they are
        return "keep"
    kept, own_noise = figures()[kind]["keep"].values(), figures()[kind]["own_noise"]
    allowed = max(own_noise, SMALL_NOISE)
    fits = all(leak <= LEAK_LIMIT and noise <= allowed for leak, noise in kept)
    return "keep" if fits else "dequantize"


@cache
def figures() -> dict[str, dict[str, Any]]:
    """All figures, by `Layout.kind`."""
    by_kind: dict[str, dict[str, Any]] = package_yaml("abliterator.formats", "measured.yaml")
    return by_kind
