"""Finished steps of a tuning as JSON values, so that an interrupted one goes on behind them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from abliterator.engines import Tokens
from abliterator.files import Journal
from abliterator.tuning._types import PreferencePair, PreferencePairs, Row, TunedEdit


class KeptSteps:
    """The steps of one tuning, which come in the same order whenever it is run."""

    def __init__(self, journal: Journal | None = None) -> None:
        """Begins with the steps in `journal`, and appends new ones; without one nothing is kept."""
        self._journal = journal
        self._kept = deque(journal.values if journal is not None else ())

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value of the next step: the kept one, or what `make` returns."""
        if self._kept:
            return self._kept.popleft()["value"]
        value = make()
        if self._journal is not None:
            self._journal.append({"step": name, "value": value})
        return value


def dump_pairs(pairs: PreferencePairs) -> Any:
    """Preference pairs as a JSON value."""
    return {"target": list(pairs.target), "neutral": list(pairs.neutral)}


def load_pairs(value: Mapping[str, Any]) -> PreferencePairs:
    """The preference pairs of `dump_pairs`."""
    target = tuple(
        PreferencePair(
            place, _tokens(prompt), _tokens(answer), _tokens(refusal), tuple(map(_tokens, rejected))
        )
        for place, prompt, answer, refusal, rejected in value["target"]
    )
    return PreferencePairs(target, tuple(Row(*map(_tokens, row)) for row in value["neutral"]))


def dump_edit(edit: TunedEdit) -> Any:
    """A tuned edit as a JSON value, without loss."""
    return {"columns": edit.basis.mT.tolist(), "strengths": dict(edit.strengths)}


def load_edit(value: Mapping[str, Any]) -> TunedEdit:
    """The edit of `dump_edit`."""
    # column by column in memory, as LAPACK leaves a basis: sums then have the same order
    columns = torch.tensor(value["columns"], dtype=torch.float64)
    return TunedEdit(columns.mT, value["strengths"])


def _tokens(ids: Sequence[int]) -> Tokens:
    return cast("Tokens", tuple(ids))
