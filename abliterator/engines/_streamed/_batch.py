"""The forward pass of one batch, in a thread that stops where it needs weights."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, copy_context
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abliterator.engines._streamed._activations import Parked
from abliterator.model import BATCH

THREAD = "streamed pass"  # name of the threads


class Call(NamedTuple):
    """A call of a part of the model, to be made when its weights are there.

    Attributes:
        part: module path.
        run: makes the call.
        context: of the batch, in which it is made.
        inference: whether torch's inference mode is on in the batch's thread.
        grad: whether gradients are recorded there.
    """

    part: str
    run: Callable[[], Any]
    context: Context
    inference: bool
    grad: bool


class Turn(NamedTuple):
    """A wait for a turn that another batch has."""

    key: str


class Ended(NamedTuple):
    """The end of a pass: its result, or what was raised."""

    result: Any
    error: BaseException | None


class _Aborted(BaseException):
    """Ends the thread of a pass that is given up."""


class Batch:
    """A batch and its pass; `BATCH` in the context of the pass.

    Attributes:
        rows: indices of the batch's prompts.
        at: what the pass waits for, or its end.
        calls: of parts, made so far.
        parked: hidden states whose memory is freed until the pass goes on.
    """

    def __init__(
        self,
        rows: list[int],
        run: Callable[[list[int]], Any],
        turns: dict[str, object],
    ) -> None:
        """The pass begins with the first `advance`.

        Args:
            rows: indices of prompts.
            run: the pass.
            turns: the batch that has each turn; batches that advance together share it.
        """
        self.rows, self.calls = rows, 0
        self.at: Call | Turn | Ended | None = None
        self.parked: list[Parked] = []
        self._turns, self._seen = turns, list[weakref.ref[Tensor]]()
        self._events, self._replies = SimpleQueue[Any](), SimpleQueue[Any]()
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._work, run), name=THREAD, daemon=True
        )

    def advance(self, reply: Callable[[], Any] | None = None) -> None:
        """Runs the pass up to its next wait, or to its end; the caller's thread waits.

        Args:
            reply: gives or raises the result of the call that the pass waits for.
        """
        self.at = None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._replies.put(reply)
        self.at = self._events.get()

    def abort(self) -> None:
        """Ends the pass where it is."""
        if self._thread.ident is None:
            return
        self._replies.put(_abort)
        self._thread.join()

    def waits_for(self, part: str) -> bool:
        """Whether the pass waits for the weights of a part."""
        return isinstance(self.at, Call) and self.at.part == part

    def is_running(self) -> bool:
        """Whether it is this pass that asks, and not a call that is made for it."""
        return threading.current_thread() is self._thread

    def wait_for(self, part: str, run: Callable[[], Any], hidden: list[Tensor]) -> Any:
        """The result of a call of a part, when someone has made it; in the pass's thread."""
        self._seen += map(weakref.ref, hidden)
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        return self._wait(Call(part, run, copy_context(), *modes))

    @contextmanager
    def turn(self, key: str) -> Iterator[None]:
        """Waits until no other batch is in a turn with this key, and keeps others out."""
        while key in self._turns:
            self._wait(Turn(key))
        self._turns[key] = self
        try:
            yield
        finally:
            del self._turns[key]

    def hidden_states(self) -> list[Tensor]:
        """Inputs of parts that the pass still refers to."""
        tensors = [ref() for ref in self._seen]
        self._seen = [ref for ref, x in zip(self._seen, tensors, strict=True) if x is not None]
        return [tensor for tensor in tensors if tensor is not None]

    def _wait(self, event: Call | Turn) -> Any:
        self._events.put(event)
        del event
        reply = self._replies.get()
        return None if reply is None else reply()

    def _work(self, run: Callable[[list[int]], Any]) -> None:
        BATCH.set(self)
        torch.set_num_threads(1)  # what runs here is small, and each thread would have its own pool
        try:
            self._events.put(Ended(run(self.rows), None))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._events.put(Ended(None, error))


def _abort() -> None:
    raise _Aborted
