"""Settings of a selection, and the prompts by which it scores."""

from __future__ import annotations

from typing import NamedTuple

from abliterator.evaluation import RenderedPrompts

# answer tokens along which distributions are compared; the first is the prompt's own
KL_TOKENS = 4


class ScoringPrompts(NamedTuple):
    """Prompts by which candidates are scored before any answer is judged.

    Attributes:
        target: prompts that show the behaviour; directions may have been taken from them.
        contrast: prompts like target on which the behaviour does not show.
    """

    target: RenderedPrompts
    contrast: RenderedPrompts
