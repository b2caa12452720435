"""One run: the resolved recipe, its plan, and the models that stages share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from abliterator.checkpoint import Checkpoint, fingerprint
from abliterator.devices import (
    AUTO,
    BALANCED,
    CPU,
    available_devices,
    choose_device,
    device_memory,
    device_name,
    release_memory,
)
from abliterator.errors import OutputError
from abliterator.files import digest_of
from abliterator.pipeline._plan import Plan
from abliterator.pipeline._progress import Progress, Silent
from abliterator.pipeline._workspace import Workspace
from abliterator.recipe import Recipe

if TYPE_CHECKING:
    from abliterator.benchmarks import Task
    from abliterator.diagnostics import VllmInstall
    from abliterator.engines import Engine, ServedEngine, TransformersEngine
    from abliterator.evaluation import RenderedPrompts
    from abliterator.model import LoadedModel
    from abliterator.record import Side


@dataclass(frozen=True)
class Options:
    """Device, dtype and folder of a run; none of them is part of the recipe.

    Attributes:
        device: a torch device; "auto", one accelerator or what the model needs beside it; or
            "balanced", all accelerators.
        dtype: dtype of computation ("float32", "bfloat16", "float16"), or "auto": as stored on an
            accelerator; on a CPU float32 where it fits in half the memory, because CPUs are faster
            at it.
        max_memory: bytes of weights on each accelerator and in host memory at most; None is a
            share of what is free.
        force: go on in a folder that another recipe made.
        vllm_python: the interpreter that has vLLM, instead of the recipe's.
    """

    device: str = AUTO
    dtype: str = "auto"
    max_memory: int | None = None
    force: bool = False
    vllm_python: str | None = None

    @property
    def compute_device(self) -> str:
        """The first device that computes, as torch names it.

        Raises:
            RecipeError: if this machine has no such device.
        """
        return choose_device(AUTO if self.device == BALANCED else self.device)

    @property
    def weights(self) -> dict[str, Any]:
        """Where weights may lie, as arguments of `load_model`."""
        device = self.device if self.device in (AUTO, BALANCED) else self.compute_device
        return {"device": device, "max_memory": self.max_memory}

    @property
    def hardware(self) -> str:
        """Names of the devices that compute, for the record."""
        devices = [self.compute_device]
        if self.device == BALANCED:
            devices = available_devices()[:-1] or devices
        counts = Counter(map(device_name, devices))
        return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in counts.items())

    def batch_size(self, size: int | Literal["auto"]) -> int:
        """Prompts that are answered together: `size`, or a number by device for "auto"."""
        if size != "auto":
            return size
        return 64 if self.compute_device.startswith("cuda") else 16

    def compute_dtype(self, checkpoint: Checkpoint) -> str | None:
        """The dtype in which a checkpoint is computed; None is the stored one."""
        if self.dtype != "auto":
            return self.dtype
        in_float32 = sum(4 * math.prod(t.shape) for t in checkpoint.tensors.values())
        fits = in_float32 < device_memory(CPU).total / 2
        return "float32" if self.compute_device == CPU and fits else None


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
    def batch_size(self) -> int:
        """Prompts that are answered together."""
        return self.options.batch_size(self.recipe.rollouts.batch_size)

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

        if self._loaded is None or self._loaded.folder != folder:
            self.free()
            self.end_engine(candidates=False)  # both would not fit on one device
            self._loaded = load_model(
                folder,
                **self.options.weights,
                dtype=self.dtype,
                trust_remote_code=self.recipe.trust_remote_code,
            )
        return self._loaded

    def free(self) -> None:
        """Drops the model that is held, and frees its memory."""
        if self._loaded is None:
            return
        self._loaded = None
        release_memory()

    def engine(self, folder: Path) -> TransformersEngine:
        """An engine of the model in `folder`; one model at a time is held (`loaded`)."""
        from abliterator.engines import TransformersEngine

        return TransformersEngine(self.loaded(folder))

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

    def render(
        self, engine: Engine, prompts: Sequence[str], *, name: str, max_new_tokens: int = 0
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
