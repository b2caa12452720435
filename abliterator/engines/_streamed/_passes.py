"""Forward passes of many batches that advance together, so that weights are read once for all.

A model's own code runs each batch in a thread, which stops wherever a part of the model whose
weights are not there is called. When all batches wait, the weights of the next part are read, the
part runs for every batch that waits for it, and the weights are dropped. One thread runs at a time.
Whatever the code keeps between two parts (masks, caches, shared keys and values) it keeps as ever.

Parts run in the caller's thread, each call in the context (`contextvars`) of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from abliterator.devices import is_out_of_memory, release_memory
from abliterator.engines._streamed._activations import Activations
from abliterator.engines._streamed._batch import Batch, Call, Ended, Turn
from abliterator.engines._streamed._weights import PartialWeights
from abliterator.model import BATCH, LoadedModel, raise_too_large

T = TypeVar("T")

# Batches that advance together at most: each has a thread.
TOGETHER = 256


class Passes:
    """Runs batches through a model whose weights are read part by part."""

    def __init__(
        self, loaded: LoadedModel, weights: PartialWeights, *, memory: int, folder: Path | None
    ) -> None:
        """Makes every part of the model wait for its weights when it is called.

        Args:
            loaded: a model without weights.
            weights: of the same model.
            memory: bytes of hidden states in host memory; more go to disk.
            folder: for these; None is the system's folder of temporary files.
        """
        self._model, self._weights = loaded.model, weights
        self._memory, self._folder = memory, folder
        self._buffers = {buffer.untyped_storage().data_ptr() for buffer in loaded.model.buffers()}
        for path in weights.parts:
            module = loaded.model.get_submodule(path)
            module.__class__ = _waiting(type(module), partial(self._call, path))
        self.spilled_bytes = 0

    def run_batches(
        self, batches: Iterable[list[int]], run: Callable[[list[int]], T]
    ) -> Iterator[tuple[list[int], T]]:
        """Yields (batch, run(batch)) in the order of the batches; one that is too large later.

        Raises:
            GenerationError: if not even one row fits in memory.
        """
        queue = list(batches)
        while queue:
            too_large: list[list[int]] = []
            for start in range(0, len(queue), TOGETHER):
                yield from self._together(queue[start : start + TOGETHER], run, too_large)
            if too_large:
                release_memory()
            queue = [half for batch in too_large for half in _halves(batch)]

    def _together(
        self,
        rows: Sequence[list[int]],
        run: Callable[[list[int]], T],
        too_large: list[list[int]],
    ) -> Iterator[tuple[list[int], T]]:
        turns: dict[str, object] = {}
        batches = [Batch(batch, run, turns) for batch in rows]
        waiting = list(batches)
        activations = Activations(self._memory, self._folder)
        threads = torch.get_num_threads()
        try:
            for batch in batches:
                self._advance(batch, activations)
            while waiting:
                for batch in waiting:
                    if isinstance(batch.at, Turn) and batch.at.key not in turns:
                        self._advance(batch, activations)
                yield from _ended(waiting, too_large)
                if part := _furthest_behind(waiting):
                    self._weights.use(part)
                for batch in [b for b in waiting if part and b.waits_for(part)]:
                    self._serve(batch, activations)
                    yield from _ended(waiting, too_large)
        finally:
            for batch in batches:
                batch.abort()
            torch.set_num_threads(threads)  # threads of batches set it for those to come
            self.spilled_bytes = max(self.spilled_bytes, activations.spilled_bytes)
            activations.close()
            self._weights.drop()

    def _serve(self, batch: Batch, activations: Activations) -> None:
        """Makes the call that a batch waits for, and runs the batch up to its next one."""
        call = batch.at
        assert isinstance(call, Call)
        activations.restore(batch.parked)
        result: Callable[[], Any]
        try:
            with torch.inference_mode(call.inference), torch.set_grad_enabled(call.grad):
                output = call.context.run(call.run)
            result = partial(_returned, output)
        except Exception as error:  # noqa: BLE001 - the batch's own code gets it
            result = partial(_raised, error)
        self._advance(batch, activations, result)

    def _advance(
        self, batch: Batch, activations: Activations, result: Callable[[], Any] | None = None
    ) -> None:
        batch.advance(result)
        batch.parked = activations.park(
            tensor
            for tensor in batch.hidden_states()
            if tensor.untyped_storage().data_ptr() not in self._buffers
        )

    def _call(self, part: str, run: Callable[[], Any], inputs: list[Tensor]) -> Any:
        """A call of a part: it waits for its turn, or reads weights for itself outside batches."""
        batch = BATCH.get()
        if isinstance(batch, Batch) and batch.is_running():
            return batch.wait_for(part, run, inputs)
        if batch is not None:  # within a part that runs
            with self._weights.beside(part):
                return run()
        self._weights.use(part)
        return run()


def _waiting(kind: type[nn.Module], call: Callable[..., Any]) -> type[nn.Module]:
    """A class of modules whose calls, hooks and all, go through `call`."""

    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = [kwargs["hidden_states"]] if "hidden_states" in kwargs else list(args)
        hidden = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        return call(partial(kind.__call__, self, *args, **kwargs), hidden[:1])

    return type(kind.__name__, (kind,), {"__call__": called, "__module__": kind.__module__})


def _ended(waiting: list[Batch], too_large: list[list[int]]) -> Iterator[tuple[list[int], Any]]:
    """Takes out the first batches if they have ended, in order, and yields their results."""
    while waiting and isinstance(ended := waiting[0].at, Ended):
        batch = waiting.pop(0)
        batch.at = None
        if ended.error is None:
            yield batch.rows, ended.result
        elif not is_out_of_memory(ended.error):
            raise ended.error
        elif len(batch.rows) == 1:
            raise_too_large(ended.error)
        else:
            too_large.append(batch.rows)


def _furthest_behind(waiting: Sequence[Batch]) -> str | None:
    """The part for which the batch waits that has made the fewest calls."""
    calling = [batch for batch in waiting if isinstance(batch.at, Call)]
    behind = min(calling, key=lambda batch: batch.calls, default=None)
    return behind.at.part if behind is not None and isinstance(behind.at, Call) else None


def _halves(batch: list[int]) -> tuple[list[int], list[int]]:
    return batch[: len(batch) // 2], batch[len(batch) // 2 :]


def _returned(output: Any) -> Any:
    return output


def _raised(error: Exception) -> Any:
    raise error
