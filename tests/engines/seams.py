"""What tests of other packages replace or read here, though no setting reaches it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from abliterator.engines import Answer, StreamedEngine, _generate, _logits
from abliterator.engines._side_by_side import EditsByRow
from abliterator.engines._streamed import _passes
from abliterator.model import LoadedModel
from abliterator.thinking import Splitter


def limit_logit_batches(monkeypatch, n_bytes: int) -> None:
    """Sets the size of one batch of logits."""
    monkeypatch.setattr(_logits, "BATCH_BYTES", n_bytes)


def answer_of(
    splitter: Splitter, prompt: Sequence[int], row: Sequence[int], stop_ids: Sequence[int]
) -> Answer:
    """The answer that an engine makes of the tokens that a model generated after a prompt."""
    return _generate.answer_of(splitter, prompt, row, stop_ids)


def unedited(loaded: LoadedModel, max_batch_tokens: int) -> EditsByRow:
    """The model as it is, with whatever hooks are on it, asked as an edit is."""
    return EditsByRow(loaded, 1, lambda rows: None, max_batch_tokens)


def limit_batches_together(monkeypatch, n: int) -> None:
    """Sets how many batches advance together at most."""
    monkeypatch.setattr(_passes, "TOGETHER", n)


def spilled_bytes(engine: StreamedEngine) -> int:
    """Bytes of hidden states that an engine has had on disk at once."""
    return engine.passes.spilled_bytes


@contextmanager
def fail_on_call(engine: StreamedEngine, nth: int, error: type[BaseException]) -> Iterator[None]:
    """Raises in the nth call of a part of the model."""
    calls, model = itertools.count(1), engine.streamed.loaded.model

    def fail(*_: object) -> None:
        if next(calls) == nth:
            raise error

    modules = map(model.get_submodule, engine.passes._weights.parts)
    handles = [module.register_forward_pre_hook(fail) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
