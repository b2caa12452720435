"""What an edit changed beside the behaviour that was to go, by answers that exist already.

Length, language and agreement are read from the answers of both sides to the same prompts, without
a judge or a model; confidence from the choices of benchmarks. Each is of base, of edited, and
their difference, paired by prompt or document.

    figures = side_effects(base_completions, edited_completions)
    figures["words"].delta
"""

from __future__ import annotations

from abliterator.side_effects._confidence import confidence_figures
from abliterator.side_effects._figures import begins_with_agreement, side_effects

__all__ = ["begins_with_agreement", "confidence_figures", "side_effects"]
