"""An engine whose batches run on a pool of workers, each of which holds the model.

The batches are those of `TransformersEngine`, and results come in their order, so that everything
is equal to one process's, bit by bit. Where there are too few batches for all workers, rows of one
batch run apart, padded as they are together: the same numbers as long as the device's kernels give
a row the same numbers in batches of other sizes, as those of a CPU do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from abliterator.engines._calls import Method
from abliterator.engines._edits import Edit
from abliterator.engines._protocol import Answer, AnswerPath, OnBatch, Padding, Tokens
from abliterator.engines._remote import (
    EditsInRows,
    EngineCall,
    LoadModel,
    ModelFacts,
    ModelFolder,
    pack,
    unpack,
)
from abliterator.engines._sampling import Sampling
from abliterator.engines._side_by_side import GroupedEdits
from abliterator.engines._work import by_prompt, in_order
from abliterator.model import Limits, load_tokenizer
from abliterator.workers import Pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class DistributedEngine:
    """A model on every worker of a pool as an `Engine`; its methods are documented there.

    Attributes:
        pool: the workers.
        model: which they load, each for itself; this process loads its tokenizer alone.
    """

    pool: Pool
    model: ModelFolder
    _edits: list[Edit] = field(default_factory=list)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        folder = self.model.tokenizer or self.model.folder
        return load_tokenizer(folder, trust_remote_code=self.model.trust_remote_code)

    @cached_property
    def facts(self) -> ModelFacts:
        """What is known of the model once all workers have loaded it, at the same time."""
        first, *_ = self.pool.each(LoadModel(self.model))
        return ModelFacts(*first)

    @property
    def limits(self) -> Limits:
        """Context length and vocabulary of the model."""
        return self.facts.limits

    @property
    def stop_ids(self) -> Tokens:
        """Token ids that end an answer."""
        return self.facts.stop_ids

    @property
    def hidden_shape(self) -> tuple[int, int]:
        """(n_layers, d_model)."""
        return self.facts.hidden_shape

    def hidden_states(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        positions: Sequence[int] = (-1,),
        padding: Padding = "none",
        max_batch_tokens: int = 4096,
        share_prefix: bool = False,
        skipped: Collection[int] = (),
    ) -> Iterator[tuple[list[int], Tensor]]:
        """The residual stream of every prompt at some positions of every layer."""
        return self.results(
            "hidden_states",
            token_ids=prompts,
            positions=positions,
            padding=padding,
            max_batch_tokens=max_batch_tokens,
            share_prefix=share_prefix,
            skipped=frozenset(skipped),
        )

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        batch_size: int | None = None,
        stop_ids: Sequence[int] | None = None,
        share_prefix: bool = False,
        sampling: Sampling | None = None,
        answered: MutableMapping[int, Answer] | None = None,
        on_batch: OnBatch | None = None,
    ) -> list[Answer]:
        """Answers, one a prompt."""
        results = self.results(
            "answers",
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            stop_ids=self.stop_ids if stop_ids is None else stop_ids,
            share_prefix=share_prefix,
            sampling=sampling,
            skipped=frozenset(answered or ()),
        )
        return in_order(results, on_batch, answered)

    def logits(
        self,
        paths: Sequence[AnswerPath],
        *,
        max_batch_tokens: int,
        share_prefix: bool = False,
        on_batch: OnBatch | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Next-token logits along given answers."""
        results = self.results(
            "logits", paths=paths, max_batch_tokens=max_batch_tokens, share_prefix=share_prefix
        )
        return by_prompt(results, on_batch)

    def log_likelihoods(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Tokens],
        *,
        max_batch_tokens: int,
        together: bool = False,
    ) -> Tensor:
        """[N, C] log-probabilities of each continuation after each prompt."""
        results = self.results(
            "log_likelihoods",
            prompts=prompts,
            continuations=continuations,
            max_batch_tokens=max_batch_tokens,
            together=together,
        )
        return torch.stack(in_order(results))

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """The model under an edit, as long as the context is open."""
        self._edits.append(pack(edit))
        try:
            self._require_edits()
            yield
        finally:
            self._edits.pop()

    @contextmanager
    def edited_side_by_side(
        self, edits: Sequence[Edit], *, max_batch_tokens: int
    ) -> Iterator[DistributedEdits]:
        """The model under several edits of one kind at once, one edit a row of each batch."""
        packed = tuple(pack(list(edits)))
        self._require_edits(EditsInRows(packed, max_batch_tokens, range(0)))
        yield DistributedEdits(self, packed, max_batch_tokens)

    def results(
        self, method: Method | None, in_rows: EditsInRows | None = None, **arguments: Any
    ) -> Iterator[tuple[list[int], Any]]:
        """Each batch of a call with its result, in the order of the batches."""
        call = EngineCall(
            self.model, method, arguments, len(self.pool), tuple(self._edits), in_rows
        )
        job = self.pool.number(call)
        (parts,) = self.pool.map(job, [None])
        done: list[Any] = []
        for part, results in zip(parts, self.pool.map(job, parts), strict=True):
            done += [unpack(result) for _, result in results]
            if part.rows[-1] != part.batch[-1]:
                continue  # sums over batches have the rounding of whole batches
            yield part.batch, torch.cat(done) if method == "hidden_states" else _joined(done)
            done.clear()

    def _require_edits(self, in_rows: EditsInRows | None = None) -> None:
        """Lets a worker put the edits in force, which raises what is wrong with them."""
        list(self.results(None, in_rows))


def _joined(parts: Sequence[list[Any]]) -> list[Any]:
    return [value for part in parts for value in part]


@dataclass(frozen=True)
class DistributedEdits(GroupedEdits):
    """A model on workers that `n` edits at once change, each in rows of its own (`SideBySide`).

    Attributes:
        engine: the model.
        edits: packed.
        max_batch_tokens: tokens in one forward pass.
    """

    engine: DistributedEngine
    edits: tuple[Edit, ...]
    max_batch_tokens: int

    @property
    def n(self) -> int:  # type: ignore[override]
        """How many edits there are."""
        return len(self.edits)

    @property
    def _stop_ids(self) -> Tokens:
        return self.engine.stop_ids

    def _results(
        self, method: Method, edits: range, **arguments: Any
    ) -> Iterator[tuple[list[int], Any]]:
        in_rows = EditsInRows(self.edits, self.max_batch_tokens, edits)
        return self.engine.results(method, in_rows, **arguments)
