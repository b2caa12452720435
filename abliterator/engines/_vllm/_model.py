"""A checkpoint that vLLM serves, started when it is first asked; edits of it are adapters.

An edit that no adapter expresses is baked to a folder of its own, which is served instead, where
this process would have to read the weights from the disk for every token.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from abliterator.bake import bake
from abliterator.checkpoint import Checkpoint
from abliterator.diagnostics import VllmInstall
from abliterator.engines._completions import FORMS, CompletionClient
from abliterator.engines._edits import Edit, WriterEdit
from abliterator.engines._protocol import Answer, OnBatch
from abliterator.engines._served import ServedModel
from abliterator.engines._vllm._adapters import (
    baked_digest,
    edit_digest,
    loaded,
    obstacle,
    planned,
    require_effect,
    slots_for,
    write_missing,
)
from abliterator.engines._vllm._command import AdapterSlots, Served, dtype_of
from abliterator.engines._vllm._http import AdapterRefused
from abliterator.engines._vllm._process import VllmServer, vllm_server
from abliterator.errors import ServerError
from abliterator.files import digest_of, free_bytes
from abliterator.recipe import EngineSettings
from abliterator.server import ReplyCache

_PROBE = "One two three four five"
_NO_ADAPTERS = "does not support LoRA"


class _StartingClient(CompletionClient):
    """A client that has its server started when an answer is not in the cache."""

    def __init__(self, client: CompletionClient, start: Callable[[], VllmServer]) -> None:
        super().__init__(client.settings, client.tokenizer, cache=client.cache)
        self._start = start

    def meet(self, server: VllmServer) -> None:
        """Asks this server from now on."""
        self.settings = self.settings.model_copy(update={"base_url": server.address.base_url})
        self.on_failure = server.require_running

    def answers(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        *,
        on_batch: OnBatch | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Greedy answers of a served model, one a prompt."""
        settings = self.settings.model_copy(update={"model": model})
        with ReplyCache(self.cache) as cache:
            kept = all(
                cache.get(self.request(prompt=prompt, **options).key(settings)) is not None
                for prompt in prompts
            )
        if not kept:
            self._start()
        return super().answers(model, prompts, on_batch=on_batch, **options)


@dataclass
class VllmModel:
    """A checkpoint and edits of it, served by vLLM (`engines.Served`).

    Attributes:
        install: the vLLM.
        served: the checkpoint; its slots are those of the edits to come, if any.
        settings: how it is started.
        identity: digest of the checkpoint's files.
        client: of its servers, whatever address it has; it gets that of each server in turn.
        log: what the server writes.
        scratch: a folder of its own, for adapters; removed when it is closed.
        note: shows a line to the user.
        bakes_edits: whether edits that no adapter expresses are baked to a folder and served.
    """

    install: VllmInstall
    served: Served
    settings: EngineSettings
    identity: str
    client: CompletionClient
    log: Path
    scratch: Path
    note: Callable[[str], None] = lambda line: None
    bakes_edits: Callable[[], bool] = lambda: False
    _running: ExitStack = field(default_factory=ExitStack)
    _server: VllmServer | None = None
    _takes_adapters: bool = True
    _shown: set[AdapterSlots] = field(default_factory=set)
    _noted: set[str] = field(default_factory=set)

    @cached_property
    def _client(self) -> _StartingClient:
        return _StartingClient(self.client, self._started)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.served.folder)

    def model(self) -> ServedModel:
        """The model without an edit; its server is started when it has something to answer."""
        return self._model_as(self.served.name, self.identity)

    def start(self) -> None:
        """Starts the server, unless it runs.

        Raises:
            ServerError: for a server that does not start, or that has ended.
        """
        self._started()

    def expect(self, edits: Sequence[Edit]) -> None:
        """Writes the adapters of edits that are served next, in one pass over the weights."""
        if self._takes_adapters:
            write_missing(
                self._checkpoint,
                {
                    self._folder(edit): edit
                    for edit in edits
                    if isinstance(edit, WriterEdit) and obstacle(edit) is None
                },
            )

    @contextmanager
    def under(self, edit: Edit) -> Iterator[ServedModel | None]:
        """The model under an edit, while the context is open; None where this process answers.

        That is where no adapter expresses the edit, unless `bakes_edits`.

        Raises:
            ServerError: as `start`.
        """
        with ExitStack() as stack:
            try:
                model = self._adapted(edit, stack)
            except AdapterRefused as error:
                self._takes_adapters = False
                self._note_fallback(f"{error}.")
                model = None
            if model is None and isinstance(edit, WriterEdit) and self.bakes_edits():
                model = self._baked(edit, stack)
            yield model

    @property
    def base_url(self) -> str:
        """Where the server answers, after starting it if need be.

        Raises:
            ServerError: as `start`.
        """
        return self._started().address.base_url

    def require_running(self) -> None:
        """Checks that the server, if it was started, did not end.

        Raises:
            ServerError: with the reason in its log.
        """
        if self._server is not None:
            self._server.require_running()

    @property
    def dtype(self) -> str | None:
        """The dtype of computation."""
        config = self._checkpoint.config
        stored = config.get("dtype") or config.get("torch_dtype")
        return dtype_of(self.served, self.settings) or stored

    def close(self) -> None:
        """Ends the server, if it runs, and removes the adapters; it can be started again."""
        self._server = None
        self._running.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _adapted(self, edit: Edit, stack: ExitStack) -> ServedModel | None:
        if inexpressible := obstacle(edit):
            self._note_fallback(f"No adapter expresses {inexpressible}.")
        if inexpressible or not isinstance(edit, WriterEdit) or not self._takes_adapters:
            return None
        server = self._with_slots(edit)
        if server is None:
            return None
        self.expect([edit])
        folder = self._folder(edit)
        stack.enter_context(loaded(server.address, folder.name, folder))
        return self._model_as(folder.name, digest_of([self.identity, folder.name]))

    def _baked(self, edit: WriterEdit, stack: ExitStack) -> ServedModel | None:
        """The edited checkpoint, written and served when it is first asked; None without disk."""
        plan, scratch = planned(edit), self.scratch
        size = self._checkpoint.total_bytes + max(0, plan.added_bytes(self._checkpoint))
        if free_bytes(scratch) < size:
            self._note_fallback(f"The disk of {scratch} has no room for a candidate's checkpoint.")
            return None
        self._note_fallback(
            f"Each candidate is baked to {scratch} and served from there: the model is larger than "
            "the memory of this process."
        )
        name = f"baked-{baked_digest(edit)[:32]}"
        folder = scratch / name

        def write() -> None:
            self._stop()  # two servers would not fit on one device
            bake(self._checkpoint, plan, edit.basis, folder)

        baked = _BakedModel(
            self.install,
            replace(self.served, folder=folder, slots=None),
            self.settings,
            digest_of([self.identity, name]),
            self.client,
            log=self.log,
            scratch=folder,
            note=self.note,
            write=write,
        )
        stack.callback(baked.close)
        return baked.model()

    def _with_slots(self, edit: WriterEdit) -> VllmServer | None:
        """A server with slots for the adapter; None for a model that takes none."""
        needed, slots = slots_for(planned(edit), edit.basis.shape[-1]), self.served.slots
        assert needed is not None
        if slots is None or slots.rank < needed.rank or not set(needed.modules) <= {*slots.modules}:
            self._stop()
            self.served = replace(self.served, slots=needed)
        server = self._started()
        if self.served.slots is None:
            return None
        if self.served.slots not in self._shown:
            prompt = self.client.tokenizer.encode(_PROBE)
            name, scratch = self.served.name, self.scratch
            require_effect(server.address, name, self._checkpoint, edit, prompt, scratch)
            self._shown.add(self.served.slots)
        return server

    def _started(self) -> VllmServer:
        if self._server is None:
            try:
                self._start()
            except ServerError as error:
                if self.served.slots is None or _NO_ADAPTERS not in str(error):
                    raise
                self._takes_adapters = False
                self._note_fallback("vLLM takes no adapters for this model.")
                self.served = replace(self.served, slots=None)
                self._start()
        assert self._server is not None
        self._server.require_running()
        return self._server

    def _start(self) -> None:
        server = vllm_server(
            self.install, self.served, self.settings, log=self.log, on_note=self.note
        )
        self._server = self._running.enter_context(server)
        self._client.meet(self._server)

    def _stop(self) -> None:
        self._server = None
        self._running.close()

    def _model_as(self, name: str, identity: str) -> ServedModel:
        return ServedModel(self._client, name, identity, FORMS[0])

    def _folder(self, edit: WriterEdit) -> Path:
        return self.scratch / f"edit-{edit_digest(edit)[:32]}"

    def _note_fallback(self, reason: str) -> None:
        if reason not in self._noted:
            self._noted.add(reason)
            self.note(reason)


@dataclass
class _BakedModel(VllmModel):
    """An edited checkpoint that is written when its server is started, and removed when it ends.

    Attributes:
        write: writes it to its folder.
    """

    write: Callable[[], None] = lambda: None

    def _start(self) -> None:
        self.write()
        super()._start()
