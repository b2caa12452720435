"""The models of a comparison: one at a time, in this process or behind a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.benchmarks import RunSettings
from abliterator.comparison._served import ServedSides
from abliterator.engines import (
    DistributedEngine,
    Engine,
    ModelFolder,
    ServedEngine,
    open_engine,
)
from abliterator.recipe import BenchmarkEngine
from abliterator.record import Asking, Side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from abliterator.workers import Pool


class SingleModelLoader:
    """Loads the model of one side at a time, here or on workers; the other one is freed first."""

    def __init__(
        self,
        folders: Mapping[Side, Path],
        settings: RunSettings,
        prompting: Asking,
        served: ServedSides | None = None,
        pool: Pool | None = None,
        *,
        note: Callable[[str], None],
    ) -> None:
        self._folders, self._settings, self.prompting = folders, settings, prompting
        self._served, self._pool, self._note = served, pool, note
        self._loaded: tuple[Side, Engine] | None = None

    def load(self, side: Side) -> Engine:
        """The model of a side, with the tokenizer that its prompts are rendered with."""
        if self._loaded is None or self._loaded[0] != side:
            as_base = side == "edited" and self.prompting == "as_base"
            if self._pool is not None:
                self._loaded = (side, self._on_workers(self._pool, side, as_base))
                return self._loaded[1]
            tokenizer = self._base_tokens[0] if as_base else None
            self.free()
            if self._served is not None:
                self._served.close()  # both would not fit on one device
            engine = open_engine(
                self._folders[side],
                device=self._settings.device,
                dtype=self._settings.dtype,
                max_memory=self._settings.max_memory,
                tokenizer=tokenizer,
                note=self._note,
            )
            self._loaded = (side, engine)
        return self._loaded[1]

    def _on_workers(self, pool: Pool, side: Side, as_base: bool) -> Engine:
        model = ModelFolder.of(self._folders[side], self._settings.dtype)
        if as_base:
            model = replace(model, tokenizer=self._folders["base"].resolve())
        return DistributedEngine(pool, model)

    def answering(self, side: Side) -> Engine:
        """What answers for a side, its prompts rendered as `load` has it."""
        if self._served is None:
            return self.load(side)
        prompts_of: Side = "base" if self.prompting == "as_base" else side
        return self._served.engine(side, prompts_of=prompts_of, passes=partial(self.load, side))

    def serving(self, side: Side) -> AbstractContextManager[str | None]:
        """The address at which a side's benchmarks run, where it was started for them."""
        if self._served is None or self._settings.section.engine == BenchmarkEngine():
            return nullcontext()
        return self._served.serving(side, passes=partial(self.load, side))

    def probe(self, side: Side, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> None:
        """Checks what answers for a side before it is waited for; nothing of this process."""
        engine = self.answering(side)
        if self._served is not None and isinstance(engine, ServedEngine):
            self._served.probe(side, engine, max(prompts, key=len), max_new_tokens)

    @property
    def stop_ids(self) -> tuple[int, ...] | None:
        """The tokens that end the answers of both sides; None for each side's own."""
        return self._base_tokens[1] if self.prompting == "as_base" else None

    @cached_property
    def _base_tokens(self) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
        engine = self.answering("base")
        return engine.tokenizer, engine.stop_ids

    def free(self) -> None:
        """Drops the model that is held, here and on workers, and frees its memory."""
        if self._pool is not None:
            self._pool.close()
        if self._loaded is None:
            return
        from abliterator.devices import release_memory

        self._loaded = None
        release_memory()
