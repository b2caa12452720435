"""One run: the resolved recipe, its plan, and the models that stages share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.checkpoint import Checkpoint, fingerprint
from abliterator.devices import (
    release_memory,
)
from abliterator.errors import OutputError
from abliterator.files import digest_of
from abliterator.pipeline._options import Options
from abliterator.pipeline._planning._plan import Plan
from abliterator.pipeline._progress import Progress, Silent
from abliterator.pipeline._workspace import Workspace
from abliterator.recipe import Recipe
from abliterator.workers import Pool, PoolSettings, open_pool

if TYPE_CHECKING:
    from abliterator.benchmarks import Task
    from abliterator.diagnostics import VllmInstall
    from abliterator.engines import DistributedEngine, Engine, ServedEngine, StreamedEngine
    from abliterator.evaluation import RenderedPrompts
    from abliterator.model import LoadedModel
    from abliterator.prompts import Prompt
    from abliterator.record import Side


@dataclass
class Run:
    """The inputs that all stages share: recipe, plan, folder and options."""

    recipe: Recipe
    plan: Plan
    workspace: Workspace
    options: Options
    progress: Progress = field(default_factory=Silent)
    tasks: Sequence[Task] = ()
    vllm: VllmInstall | None = None
    _loaded: LoadedModel | None = None
    _streamed: StreamedEngine | None = None
    _pool: Pool | None = None
    _distributed: DistributedEngine | None = None
    # devices that the weights of a loaded model were spread over
    _spread_over: frozenset[str] = frozenset()
    # of the base's files, when they were first needed
    _base_hashes: dict[str, str] | None = None
    _served: dict[Path, Engine] = field(default_factory=dict)
    # of a checkpoint, with or without candidates
    _by_vllm: tuple[tuple[Path, bool], ServedEngine] | None = None

    @property
    def device(self) -> str:
        """The device of computation."""
        return self.options.compute_device

    @property
    def dtype(self) -> str | None:
        """The dtype of computation; None is the stored one."""
        return self.options.compute_dtype(self.plan.checkpoint)

    @property
    def batch_size(self) -> int | None:
        """Prompts that are answered together; None for the engine's choice."""
        size = self.recipe.rollouts.batch_size
        return None if size == "auto" else size

    @property
    def base_id(self) -> str:
        """The base's public name: of a local folder only the last part."""
        source = self.plan.source
        local = source.revision is None and not source.id.startswith("embedded:")
        return Path(source.id).name if local else source.id

    def base_files(self) -> dict[str, str]:
        """SHA-256 (hex) of every base file that is read: weights, config, tokenizer, custom code.

        Raises:
            OutputError: if a file was changed since this run read it first.
        """
        planned = self.plan.checkpoint
        hashes = fingerprint(planned, cache=self.workspace.fingerprints)
        if self._base_hashes is None:
            # the plan's was opened before anything was hashed
            stored = Checkpoint.open(planned.folder)
            same_tensors = (
                stored.tensors == planned.tensors and stored.file_bytes == planned.file_bytes
            )
            if not (same_tensors and digest_of(stored.config) == digest_of(planned.config)):
                raise _base_changed(planned.folder)
            self._base_hashes = hashes
        if hashes != self._base_hashes:
            raise _base_changed(planned.folder)
        return hashes

    def base_digest(self) -> str:
        """Digest of `base_files`."""
        return digest_of(self.base_files())

    def loaded(self, folder: Path) -> LoadedModel:
        """The model in `folder`; one model at a time is held, so asking for another frees it."""
        from abliterator.model import load_model

        if self._streamed is not None and self._streamed.folder == folder:
            return self._streamed.placed().loaded
        if self._loaded is not None and self._loaded.folder == folder:
            return self._loaded
        with self._loading_bar(folder):
            return self._held(load_model(folder, **self._loading))

    @contextmanager
    def _loading_bar(self, folder: Path) -> Iterator[None]:
        """Frees what is held, and shows that a model is loaded."""
        self.free()
        self.end_engine(candidates=False)  # both would not fit on one device
        names = {self.workspace.checkpoint: "edited", self.plan.source.folder: "base"}
        with self.progress.bar(f"loading {names.get(folder, folder.name)}", 0):
            yield

    @property
    def hardware(self) -> str:
        """Names of the devices that compute: those that `--device auto` spread a model over too."""
        return self.options.hardware(self._spread_over)

    def free(self) -> None:
        """Drops the model that is held, here and on workers, and frees its memory."""
        if self._pool is not None:
            self._pool.close()
            self._pool = self._distributed = None
        if self._loaded is None and self._streamed is None:
            return
        self._loaded = self._streamed = None
        release_memory()

    def engine(self, folder: Path) -> Engine:
        """An engine of the model in `folder`; one model at a time is held.

        Where `--device auto` would leave weights on disk, they are read block by block instead.
        """
        from abliterator.engines import StreamedEngine, TransformersEngine, open_engine

        if self.options.pool is not None:
            return self._engine_on_workers(folder, self.options.pool)
        if self._streamed is not None and self._streamed.folder == folder:
            return self._streamed
        if self._loaded is not None and self._loaded.folder == folder:
            return TransformersEngine(self._loaded)
        with self._loading_bar(folder):
            scratch, note = self.workspace.work, self.progress.note
            engine = open_engine(folder, **self._loading, scratch=scratch, note=note)
        if isinstance(engine, StreamedEngine):
            self._streamed = engine
        else:
            self._held(engine.loaded)
        return engine

    def is_beyond_memory(self, folder: Path) -> bool:
        """Whether weights of the model in `folder` would lie on disk in this process."""
        from abliterator.model import needs_disk, placement_of

        if self.options.pool is not None:
            return False
        if (loaded := self.held(folder)) is not None:
            return needs_disk(loaded.placement)
        if self._streamed is not None and self._streamed.folder == folder:
            return True
        return needs_disk(placement_of(folder, **self._loading))

    def _held(self, loaded: LoadedModel) -> LoadedModel:
        self._loaded = loaded
        if len(places := frozenset(loaded.placement.values())) > 1:
            self._spread_over |= places
        return loaded

    @property
    def _loading(self) -> dict[str, Any]:
        trusted = self.recipe.trust_remote_code
        return {**self.options.weights, "dtype": self.dtype, "trust_remote_code": trusted}

    def held(self, folder: Path) -> LoadedModel | None:
        """The model in `folder`, if it is loaded already."""
        return self._loaded if self._loaded and self._loaded.folder == folder else None

    def answering(self, folder: Path, side: Side = "base", *, candidates: bool = False) -> Engine:
        """An engine whose answers come from where the recipe's `engine` says.

        Args:
            folder: the checkpoint of a side.
            side: base or edited.
            candidates: whether it will be asked under edits. A running server serves none, and
                answers that are compared come from one engine: this process.

        Raises:
            ServerError: if the server's key is not set.
        """
        kind = self.recipe.engine.kind
        if kind == "transformers":
            return self.engine(folder)
        if kind == "vllm":
            return self._answering_by_vllm(folder, side, candidates=candidates)
        if candidates:
            self.progress.note(
                "Candidates are answered by this process: a running server serves no edits of its "
                "model."
            )
            return self.engine(folder)
        from abliterator.pipeline._engines import served_engine

        if folder not in self._served:
            self._served[folder] = served_engine(self, folder, side)
        return self._served[folder]

    def _answering_by_vllm(self, folder: Path, side: Side, *, candidates: bool) -> Engine:
        from abliterator.pipeline._vllm import vllm_engine

        if self._by_vllm is None or self._by_vllm[0] != (folder, candidates):
            self.end_engine()
            if not candidates:
                self.free()
            engine = vllm_engine(self, folder, side, candidates=candidates)
            self._by_vllm = (folder, candidates), engine
        return self._by_vllm[1]

    def end_engine(self, *, candidates: bool | None = None) -> None:
        """Ends the vLLM that the run started, if there is one; asking it starts it again.

        Args:
            candidates: end one alone that serves candidates, or one alone that serves none.
        """
        if self._by_vllm is None or candidates not in (None, self._by_vllm[0][1]):
            return
        from abliterator.engines import VllmModel

        served = self._by_vllm[1].served
        if isinstance(served, VllmModel):
            served.close()

    def answers_depend_on(self, *, candidates: bool = False) -> list[Any]:
        """What a stage's key holds of the engine that answers; nothing of transformers."""
        engine = self.recipe.engine
        in_process = engine.kind == "transformers" or (candidates and engine.kind == "server")
        return [] if in_process else [engine.affecting_answers()]

    def _engine_on_workers(self, folder: Path, settings: PoolSettings) -> DistributedEngine:
        from abliterator.engines import DistributedEngine, ModelFolder

        if self._distributed is None or self._distributed.model.folder != folder.resolve():
            model = ModelFolder.of(folder, self.dtype, self.recipe.trust_remote_code)
            self._distributed = DistributedEngine(self.workers(settings), model)
        return self._distributed

    def workers(self, settings: PoolSettings) -> Pool:
        """The workers, started unless they run; each has seen the base and the output folder.

        Raises:
            WorkerError: if there is no room for them.
            CheckpointError: if one does not see the same files.
        """
        from abliterator.engines import ModelFolder, SharedFolder

        if self._pool is None:
            self.free()
            self._pool = open_pool(settings)
            base = ModelFolder.of(self.plan.source.folder, self.dtype)
            self._pool.each(SharedFolder(base, self.workspace.work.resolve()))
        return self._pool

    def render(
        self, engine: Engine, prompts: Sequence[Prompt], *, name: str, max_new_tokens: int = 0
    ) -> RenderedPrompts:
        """Prompts with the token ids of each in the recipe's chat.

        Args:
            engine: the model that reads them.
            prompts: of one set.
            name: of the set, for messages.
            max_new_tokens: of an answer, which must fit the context too.

        Raises:
            PromptError: for a prompt that is too long for the model.
            CheckpointError: for tokens that the model has no embedding of.
        """
        from abliterator.evaluation import RenderedPrompts
        from abliterator.model import render_prompts

        token_ids = render_prompts(
            engine.tokenizer,
            prompts,
            engine.limits,
            name=name,
            max_new_tokens=max_new_tokens,
            **self.recipe.chat.model_dump(include={"system", "template_kwargs"}),
        )
        return RenderedPrompts(prompts, token_ids)

    def section(self, name: str, *, exclude: Collection[str] = ()) -> dict[str, Any]:
        """A section of the recipe as plain values, as a stage's key holds it."""
        section: dict[str, Any] = getattr(self.recipe, name).model_dump(
            mode="json", exclude=set(exclude)
        )
        return section

    def digest(self, stage: str) -> str:
        """Digest of the artefacts of an earlier stage.

        Raises:
            OutputError: if an artefact was changed since.
        """
        return self.workspace.digest(stage)


def _base_changed(folder: Path) -> OutputError:
    return OutputError(
        f"The base model in {folder} was changed while this run was at work, so that its parts "
        "would be of two models. Give the same command again when the folder is at rest: what was "
        "made of the old files is made anew."
    )
