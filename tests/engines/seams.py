"""What tests of other packages replace or read here, though no setting reaches it."""

from __future__ import annotations

from collections.abc import Sequence

from abliterator.engines import Answer, _generate, _logits
from abliterator.engines._side_by_side import EditsByRow
from abliterator.model import LoadedModel
from abliterator.thinking import Splitter


def limit_logit_batches(monkeypatch, n_bytes: int) -> None:
    """Sets the size of one batch of logits."""
    monkeypatch.setattr(_logits, "BATCH_BYTES", n_bytes)


def answer_of(
    splitter: Splitter, prompt: Sequence[int], row: Sequence[int], stop_ids: Sequence[int]
) -> Answer:
    """The answer that an engine makes of the tokens that a model generated after a prompt."""
    return _generate._answer(splitter, prompt, row, stop_ids)


def unedited(loaded: LoadedModel, max_batch_tokens: int) -> EditsByRow:
    """The model as it is, with whatever hooks are on it, asked as an edit is."""
    return EditsByRow(loaded, 1, lambda rows: None, max_batch_tokens)
