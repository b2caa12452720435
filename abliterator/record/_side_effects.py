"""What an edit changed beside the behaviour that was to go, by answers that exist already."""

from __future__ import annotations

from typing import Literal

from abliterator.record._measured import Estimate, Frozen

SideEffect = Literal["tokens", "words", "other_language", "agreement"]
ConfidenceFigure = Literal["calibration_error", "overconfidence"]


class PairedFigure(Frozen):
    """A figure of base and of edited, and edited - base, paired by prompt or document."""

    base: Estimate | None
    edited: Estimate | None
    delta: Estimate | None
