"""Runs prompts under many edits at once: each row of a batch has its own prompt and edit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from abliterator.bake import preview_edits
from abliterator.engines._calls import Method, open_call
from abliterator.engines._edits import Edit, Steering, WriterEdit
from abliterator.engines._generate import stop_ids
from abliterator.engines._protocol import Answer, AnswerPath, Tokens
from abliterator.engines._work import by_prompt, in_order
from abliterator.errors import GenerationError
from abliterator.model import ByRow, LoadedModel, hooked, in_each_stream, shared_tokens

Choose = Callable[[Sequence[int]], None]

# The edit of every row of the batch that runs: batches may advance together, each in its context.
_EDIT_OF_ROWS: ContextVar[Tensor] = ContextVar("edit_of_rows")


class GroupedEdits(ABC):
    """Prompts under `n` edits at once, in groups of edits whose rows run together (`SideBySide`).

    Attributes:
        n: edits.
        max_batch_tokens: tokens in one forward pass.
    """

    n: int
    max_batch_tokens: int

    def answers(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int | None
    ) -> list[list[Answer]]:
        """Greedy answers to `prompts`, for each edit."""
        answers: list[Answer] = []
        for edits in self._groups(prompts):
            results = self._results(
                "answers",
                edits,
                prompts=list(prompts) * len(edits),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                stop_ids=self._stop_ids,
                share_prefix=True,
            )
            answers += in_order(results)
        return [answers[i * len(prompts) :][: len(prompts)] for i in range(self.n)]

    def logits(self, paths: Sequence[AnswerPath]) -> Iterator[tuple[int, int, Tensor]]:
        """Logits along given answers: edit, index of the path, [positions, V] on the CPU."""
        for edits in self._groups([path.prompt for path in paths]):
            results = self._results(
                "logits",
                edits,
                paths=list(paths) * len(edits),
                max_batch_tokens=self.max_batch_tokens,
                share_prefix=True,
            )
            for index, logits in by_prompt(results):
                yield edits[index // len(paths)], index % len(paths), logits

    def log_likelihoods(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Tokens]
    ) -> Tensor:
        """[n, N, C] float64 log-probabilities of each continuation after each prompt, nats."""
        rows: list[Tensor] = []
        for edits in self._groups(prompts):
            results = self._results(
                "log_likelihoods",
                edits,
                prompts=list(prompts) * len(edits),
                continuations=continuations,
                max_batch_tokens=self.max_batch_tokens,
            )
            rows += in_order(results)
        return torch.stack(rows).view(self.n, len(prompts), -1)

    @property
    @abstractmethod
    def _stop_ids(self) -> Sequence[int]:
        """Token ids that end an answer."""

    @abstractmethod
    def _results(
        self, method: Method, edits: range, **arguments: Any
    ) -> Iterator[tuple[list[int], Any]]:
        """Each batch of a call with its result; rows are all prompts under each of `edits`."""

    def _groups(self, prompts: Sequence[Sequence[int]]) -> list[range]:
        """Groups of edits whose shared prompt beginnings fit one forward pass."""
        size = max(1, self.max_batch_tokens // max(1, shared_tokens(prompts)))
        return [range(i, min(i + size, self.n)) for i in range(0, self.n, size)]


@dataclass(frozen=True)
class EditsByRow(GroupedEdits):
    """A loaded model that `n` edits at once change, each in rows of its own.

    Attributes:
        loaded: the model.
        n: edits.
        choose: called before a forward pass with the edit of every row.
        max_batch_tokens: tokens in one forward pass.
    """

    loaded: LoadedModel
    n: int
    choose: Choose
    max_batch_tokens: int

    def by_row(self, n_rows: int, edits: range) -> ByRow:
        """An equal number of rows for each of some edits, one after the other."""
        return ByRow(
            [i for i in range(len(edits)) for _ in range(n_rows // len(edits))],
            lambda rows: self.choose([edits[row] for row in rows]),
        )

    @property
    def _stop_ids(self) -> Sequence[int]:
        return stop_ids(self.loaded)

    def _results(
        self, method: Method, edits: range, **arguments: Any
    ) -> Iterator[tuple[list[int], Any]]:
        by_row = self.by_row(n_rows(arguments), edits)
        with open_call(self.loaded, method, residuals=(), by_row=by_row, **arguments) as work:
            yield from work.results()


def n_rows(arguments: Mapping[str, Any]) -> int:
    """How many prompts or paths a call has."""
    return len(arguments["paths"] if "paths" in arguments else arguments["prompts"])


@contextmanager
def edited_by_row(
    loaded: LoadedModel,
    blocks: Sequence[str],
    edits: Sequence[Edit],
    *,
    max_batch_tokens: int,
    rows_axis: int = 0,
) -> Iterator[EditsByRow]:
    """The model under several edits of one kind, side by side.

    Args:
        loaded: the model.
        blocks: module paths of all blocks, in order.
        edits: of one kind.
        max_batch_tokens: tokens in one forward pass.
        rows_axis: of a block's output, the axis that counts the rows of a batch.

    Raises:
        GenerationError: for edits of several kinds, or of a kind that has no such form.
    """
    writer_edits = [edit for edit in edits if isinstance(edit, WriterEdit)]
    steerings = [edit for edit in edits if isinstance(edit, Steering)]
    if writer_edits and len(writer_edits) == len(edits):
        plan, bases = writer_edits[0].plan, [edit.basis for edit in writer_edits]
        has_own = any(edit.strengths for edit in writer_edits)
        strengths = [edit.strengths for edit in writer_edits] if has_own else []
        with preview_edits(loaded, plan, bases, strengths) as choose:
            yield EditsByRow(loaded, len(edits), choose, max_batch_tokens)
    elif steerings and len(steerings) == len(edits):
        with _steered(loaded, blocks, steerings, rows_axis) as choose:
            yield EditsByRow(loaded, len(edits), choose, max_batch_tokens)
    else:
        raise GenerationError(
            "Edits run side by side where all are of one kind: of the writers of one plan, or "
            "directions that are added. Run these one at a time."
        )


@contextmanager
def _steered(
    loaded: LoadedModel, blocks: Sequence[str], steerings: Sequence[Steering], rows_axis: int
) -> Iterator[Choose]:
    """Each direction added at its layer, at every token and as it is, in rows of its own."""

    def choose(rows: Sequence[int]) -> None:
        _EDIT_OF_ROWS.set(torch.tensor(rows, device=loaded.device))

    def adder(layer: int) -> Callable[[Tensor], Tensor]:
        at_layer = [s.direction if s.layer == layer else s.direction * 0 for s in steerings]
        table = torch.stack(at_layer).to(loaded.model.dtype)
        table_on = cache(table.to)

        def add(streams: Tensor) -> Tensor:
            added = table_on(streams.device)[_EDIT_OF_ROWS.get().to(streams.device)]
            shape = [1] * (streams.ndim - 1) + [-1]
            shape[rows_axis] = len(added)
            return streams + added.view(shape)

        return lambda hidden: in_each_stream(hidden, table.shape[-1], add)

    layers = sorted({steering.layer for steering in steerings})
    with hooked(loaded.model, {blocks[layer - 1]: adder(layer) for layer in layers}):
        yield choose
