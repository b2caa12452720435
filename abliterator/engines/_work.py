"""One call of an engine as batches, which may run in any order and in several processes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from abliterator.engines._protocol import OnBatch
from abliterator.model import RunBatches, remaining, run_batches

T = TypeVar("T")


@dataclass(frozen=True)
class Work(Generic[T]):
    """Batches of prompts, and what runs one of them.

    Attributes:
        plan: the batches, each the indices of its prompts; the same wherever the same model is
            loaded.
        run: the result of one batch, which does not depend on the batches before it.
        run_part: the result of some rows of a batch, given it whole, as they have it there; None
            where that is what `run` gives for these rows alone, or `run` needs whole batches.
        is_divisible: whether rows of a batch may run apart.
        run_batches: runs the batches in this process, as the loaded model does it.
    """

    plan: Callable[[], list[list[int]]]
    run: Callable[[list[int]], T]
    run_part: Callable[[list[int], list[int]], T] | None = None
    is_divisible: bool = True
    run_batches: RunBatches = run_batches

    def without(self, done: Container[int]) -> Work[T]:
        """The same work without the prompts that are done; the others stay in their batches."""
        return replace(self, plan=lambda: remaining(self.plan(), done))

    def results(self) -> Iterator[tuple[list[int], T]]:
        """Each batch with its result; a batch that does not fit in memory is halved."""
        return self.run_batches(self.plan(), self.run)


def by_prompt(
    results: Iterable[tuple[list[int], Sequence[T]]], on_batch: OnBatch | None = None
) -> Iterator[tuple[int, T]]:
    """The index of each prompt with its result, batch by batch.

    Args:
        results: each batch with one result a prompt.
        on_batch: called with the number of prompts after each batch.
    """
    for batch, of_batch in results:
        yield from zip(batch, of_batch, strict=True)
        if on_batch:
            on_batch(len(batch))


def in_order(
    results: Iterable[tuple[list[int], Sequence[T]]],
    on_batch: OnBatch | None = None,
    done: MutableMapping[int, T] | None = None,
) -> list[T]:
    """The results of all prompts, in the order of the prompts.

    Args:
        results: see `by_prompt`, as for `on_batch`.
        on_batch: see there.
        done: results that there are already, by prompt; each batch's are added by `update`.
    """
    of_prompts = {} if done is None else done
    for batch, of_batch in results:
        of_prompts.update(zip(batch, of_batch, strict=True))
        if on_batch:
            on_batch(len(batch))
    return [of_prompts[i] for i in range(len(of_prompts))]
