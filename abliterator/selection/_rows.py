"""Prompts under many edits at once: every row of a batch has a prompt and an edit of its own.

Whatever is asked here is asked of every prompt under every edit, and comes back edit by edit. Equal
to one edit at a time up to the rounding of other batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterator.bake import preview_edits
from abliterator.generation import Answer, generate, stop_ids
from abliterator.model import ByRow, hooked, shared_tokens
from abliterator.selection._forced import forced_logprobs
from abliterator.selection._openings import Tokens, refusal_scores
from abliterator.selection._types import Asked, Subject

Choose = Callable[[Sequence[int]], None]


@dataclass(frozen=True)
class Edited:
    """A model that `n` interventions at once change, each in rows of its own.

    Attributes:
        subject: the model and how it is run.
        n: interventions.
        choose: called before a forward pass with the intervention of every row.
    """

    subject: Subject
    n: int
    choose: Choose

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[Answer]]:
        """Greedy answers to `prompts`, for each intervention."""
        found: list[Answer] = []
        for some in self._groups(prompts):
            found += generate(
                self.subject.loaded,
                list(prompts) * len(some),
                max_new_tokens=max_new_tokens,
                batch_size=self.subject.batch_size,
                stop_ids=stop_ids(self.subject.loaded),
                share_prefix=True,
                by_row=self._by_row(prompts, some),
            )
        return [found[i * len(prompts) :][: len(prompts)] for i in range(self.n)]

    def refusal(self, asked: Asked, openings: Sequence[Tokens]) -> list[float]:
        """The mean log-odds of a refusing opening over prompts, for each intervention."""
        scores = [
            refusal_scores(
                self.subject.loaded,
                list(asked.token_ids) * len(some),
                openings,
                max_batch_tokens=self.subject.max_batch_tokens,
                by_row=self._by_row(asked.token_ids, some),
            )
            for some in self._groups(asked.token_ids)
        ]
        return [float(mean) for mean in torch.cat(scores).view(self.n, -1).mean(dim=1)]

    def along(self, forced: Sequence[Tokens]) -> Iterator[tuple[int, int, Tensor]]:
        """Distributions along given answers to the neutral prompts, or to the first of them.

        Yields:
            Intervention, prompt, and [len(forced[prompt]) + 1, V] log-probabilities.
        """
        prompts = self.subject.neutral.token_ids[: len(forced)]
        for some in self._groups(prompts):
            for index, logprobs in forced_logprobs(
                self.subject.loaded,
                list(prompts) * len(some),
                list(forced) * len(some),
                max_batch_tokens=self.subject.max_batch_tokens,
                by_row=self._by_row(prompts, some),
            ):
                yield some[index // len(prompts)], index % len(prompts), logprobs

    def _groups(self, prompts: Sequence[Sequence[int]]) -> list[range]:
        """Interventions in groups so small that what prompts begin with fits one forward pass."""
        at_once = max(1, self.subject.max_batch_tokens // max(1, shared_tokens(prompts)))
        return [range(i, min(i + at_once, self.n)) for i in range(0, self.n, at_once)]

    def _by_row(self, prompts: Sequence[Sequence[int]], some: range) -> ByRow:
        """Every prompt under each of some interventions, one after the other."""
        return ByRow(
            [i for i in range(len(some)) for _ in prompts],
            lambda rows: self.choose([some[row] for row in rows]),
        )


def unedited(subject: Subject) -> Edited:
    """The base as it is."""
    return Edited(subject, 1, lambda rows: None)


@contextmanager
def removed(subject: Subject, bases: Sequence[Tensor]) -> Iterator[Edited]:
    """The edits that remove each of `bases` [H, k], side by side."""
    with preview_edits(subject.loaded, subject.plan, bases) as choose:
        yield Edited(subject, len(bases), choose)


@contextmanager
def added(
    subject: Subject, layers: Sequence[int], directions: Sequence[Tensor]
) -> Iterator[Edited]:
    """Each of `directions` [H] added at its layer, at every token and as it is, side by side."""
    loaded = subject.loaded
    chosen: list[Tensor] = []

    def choose(rows: Sequence[int]) -> None:
        chosen[:] = [torch.tensor(rows, device=loaded.device)]

    def adder(layer: int) -> Callable[[Tensor], Tensor]:
        at_layer = [
            direction if at == layer else torch.zeros_like(direction)
            for at, direction in zip(layers, directions, strict=True)
        ]
        table = torch.stack(at_layer).to(loaded.device, loaded.model.dtype)
        return lambda hidden: hidden + table[chosen[0]][:, None]

    hooks = {subject.blocks[layer - 1]: adder(layer) for layer in sorted(set(layers))}
    with hooked(loaded.model, hooks):
        yield Edited(subject, len(directions), choose)
