"""What a format leaves of an edit's strengths, summarised by component."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from abliterator.record import EffectiveStrength, SurvivingStrength
from abliterator.verification import stored_strengths

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-3  # strength below which a component of a block was not edited


def surviving_strengths(
    base: Path, built: Path, quantized: Path, basis: Tensor
) -> tuple[SurvivingStrength, ...]:
    """The strengths along Q that a quantised edit has, beside those that it was built with.

    Args:
        base: folder of the base, not quantised.
        built: folder of the edit, not quantised.
        quantized: folder with the numbers of the quantised edit.
        basis: Q [H, k], orthonormal, or [L, H, k] with one a block.
    """
    before, after = stored_strengths(base, built, basis), stored_strengths(base, quantized, basis)
    pairs = [
        (old, new)
        for old, new in zip(before, after, strict=True)
        if old.strength is not None and new.strength is not None and abs(old.strength) > _LEAST
    ]
    components = dict.fromkeys(old.component for old, _ in pairs)
    return tuple(
        _summary(name, *zip(*(pair for pair in pairs if pair[0].component == name), strict=True))
        for name in components
    )


def _summary(
    component: str, before: Sequence[EffectiveStrength], after: Sequence[EffectiveStrength]
) -> SurvivingStrength:
    strengths = [entry.strength or 0.0 for entry in after]
    leaks = [entry.leak or 0.0 for entry in after]
    return SurvivingStrength(
        component=component,
        blocks=len(after),
        built=median(entry.strength or 0.0 for entry in before),
        low=min(strengths),
        median=median(strengths),
        high=max(strengths),
        leak_built=median(entry.leak or 0.0 for entry in before),
        leak=median(leaks),
        leak_high=max(leaks),
    )
