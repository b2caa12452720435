"""The calls of an engine by name, each as batches on a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from abliterator.engines._generate import answer_work
from abliterator.engines._hidden import hidden_work
from abliterator.engines._logits import likelihood_work, logits_work
from abliterator.engines._work import Work
from abliterator.model import LoadedModel

Method = Literal["hidden_states", "answers", "logits", "log_likelihoods"]


def open_call(
    loaded: LoadedModel,
    method: Method,
    *,
    residuals: Sequence[Sequence[str]],
    **arguments: Any,
) -> AbstractContextManager[Work[Any]]:
    """The batches of a call.

    Args:
        loaded: the model, hooks and all.
        method: of `Engine`.
        residuals: module paths, as `hidden_work` takes them.
        arguments: of the method; also `by_row`, where edits differ between the rows.
    """
    if method == "answers":
        return answer_work(loaded, **arguments)
    if method == "hidden_states":
        return nullcontext(hidden_work(loaded, residuals=residuals, **arguments))
    if method == "logits":
        return nullcontext(logits_work(loaded, **arguments))
    return nullcontext(likelihood_work(loaded, **arguments))
