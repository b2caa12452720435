"""What tests of other packages replace or read here, though no setting reaches it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from abliterator.model import LoadedModel
from abliterator.tuning._rows import answer_logprobs
from abliterator.tuning._types import Row


def tuned_logprobs(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """[tokens, V] log-probabilities along each given answer, as tuning reads them."""
    rows = [Row(tuple(p), tuple(a)) for p, a in zip(prompts, answers, strict=True)]
    return list(answer_logprobs(loaded, rows))
