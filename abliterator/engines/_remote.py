"""Calls of an engine as data, and how a worker runs their batches on the model that it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from abliterator.devices import choose_device, release_memory
from abliterator.engines._calls import Method, open_call
from abliterator.engines._edits import Edit
from abliterator.engines._protocol import Tokens
from abliterator.engines._side_by_side import n_rows
from abliterator.engines._transformers import TransformersEngine
from abliterator.errors import CheckpointError
from abliterator.files import digest_of
from abliterator.model import Limits, load_model, load_tokenizer, run_batches
from abliterator.workers import PackedTensor, Resident, pack_tensor, unpack_tensor


def pack(value: Any) -> Any:
    """The value with all tensors packed: a tensor, a list of them, an edit, or anything else."""
    if isinstance(value, Tensor):
        return pack_tensor(value)
    return _each(pack, Tensor, value)


def unpack(value: Any) -> Any:
    """The value that `pack` got."""
    if isinstance(value, PackedTensor):
        return unpack_tensor(value)
    return _each(unpack, PackedTensor, value)


def _each(convert: Callable[[Any], Any], kind: type, value: Any) -> Any:
    """`value` with what a list or an edit has of a kind converted."""
    if isinstance(value, list):
        return [convert(part) for part in value]
    if isinstance(value, Edit):
        values = {f.name: getattr(value, f.name) for f in fields(value)}
        changes = {name: convert(v) for name, v in values.items() if isinstance(v, kind)}
        return replace(value, **changes)
    return value


@dataclass(frozen=True)
class ModelFolder:
    """A model that workers load, each for itself.

    Attributes:
        folder: where its files are, on every machine.
        dtype: of computation; None is the stored one.
        trust_remote_code: whether Python files in `folder` may run.
        digest: of its config and of the sizes of its weight files, which every machine must see.
        tokenizer: another folder, whose tokenizer prompts are rendered with.
    """

    folder: Path
    dtype: str | None
    trust_remote_code: bool = False
    digest: str = ""
    tokenizer: Path | None = None

    @classmethod
    def of(cls, folder: Path, dtype: str | None, trust_remote_code: bool = False) -> ModelFolder:
        """The model in a folder, as this machine sees it."""
        folder = folder.resolve()
        return cls(folder, dtype, trust_remote_code, _digest(folder))

    def require_same(self) -> None:
        """Checks that this machine sees the same files.

        Raises:
            CheckpointError: if it sees others, or none.
        """
        if not (self.folder / "config.json").is_file():
            problem = "has no model"
        elif _digest(self.folder) != self.digest:
            problem = "has another model than on the machine that started this"
        else:
            return
        raise CheckpointError(
            f"{self.folder} {problem}, seen from a worker's machine. Put the model, and the output "
            "folder, on a file system that all machines share under the same path, or copy the "
            "model to each of them."
        )


def _digest(folder: Path) -> str:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    return digest_of([(folder / "config.json").read_text(encoding="utf-8"), sizes])


@dataclass(frozen=True)
class SharedFolder:
    """Checks that a worker sees the model's files, and a folder that others will be written to.

    Attributes:
        model: that is looked for.
        out: the file that must be there, or None.
    """

    model: ModelFolder
    out: Path | None = None

    @contextmanager
    def opened(self, resident: Resident) -> Iterator[Callable[[None], None]]:
        """What checks it."""

        def check(_: None) -> None:
            self.model.require_same()
            if self.out is not None and not self.out.exists():
                raise CheckpointError(
                    f"{self.out} cannot be seen from a worker's machine. Choose an --out on a file "
                    "system that all machines share under the same path."
                )

        yield check


class ModelFacts(NamedTuple):
    """What a driver needs to know of a model that it does not load."""

    limits: Limits
    stop_ids: Tokens
    hidden_shape: tuple[int, int]


@dataclass(frozen=True)
class LoadModel:
    """Loads a model in a worker, and returns its `ModelFacts`."""

    model: ModelFolder

    @contextmanager
    def opened(self, resident: Resident) -> Iterator[Callable[[None], ModelFacts]]:
        """What loads it."""

        def load(_: None) -> ModelFacts:
            engine = _engine(resident, self.model)
            return ModelFacts(engine.limits, engine.stop_ids, engine.hidden_shape)

        yield load


@dataclass(frozen=True)
class EditsInRows:
    """Edits that run side by side in a call, one for each row of a batch.

    Attributes:
        edits: all of them, packed.
        max_batch_tokens: tokens in a forward pass.
        group: those whose rows this call has, each with all prompts.
    """

    edits: tuple[Edit, ...]
    max_batch_tokens: int
    group: range


class Part(NamedTuple):
    """Some rows of a batch, and the whole batch."""

    rows: list[int]
    batch: list[int]


def parts_of(batches: Sequence[list[int]], workers: int) -> list[Part]:
    """Batches, or where there are too few to keep all workers busy, equal parts of each batch."""
    if len(batches) >= 4 * workers or len(batches) % workers == 0:
        return [Part(batch, batch) for batch in batches]
    parts = []
    for batch in batches:
        size = -(-len(batch) // workers)
        parts += [Part(batch[i : i + size], batch) for i in range(0, len(batch), size)]
    return parts


@dataclass(frozen=True)
class EngineCall:
    """One call of an engine: a job of parts of batches; the item None is their plan.

    Attributes:
        model: which the worker loads if it holds another.
        method: of the engine; None only puts the edits in force.
        arguments: of the method.
        workers: among whom batches are divided, where there are few.
        edits: those in force, packed, the outermost first.
        in_rows: those that differ between the rows.
    """

    model: ModelFolder
    method: Method | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    edits: tuple[Edit, ...] = ()
    in_rows: EditsInRows | None = None

    @contextmanager
    def opened(self, resident: Resident) -> Iterator[Callable[[Part | None], Any]]:
        """What runs a part of a batch: a list of (rows, result), several where it was halved."""
        engine = _engine(resident, self.model)
        with ExitStack() as stack:
            for edit in self.edits:
                stack.enter_context(engine.edited(unpack(edit)))
            options = dict(self.arguments)
            if (rows := self.in_rows) is not None:
                edited = stack.enter_context(
                    engine.edited_side_by_side(
                        unpack(list(rows.edits)), max_batch_tokens=rows.max_batch_tokens
                    )
                )
                if self.method is not None:
                    options["by_row"] = edited.by_row(n_rows(options), rows.group)
            if self.method is None:
                yield lambda _: []
                return
            call = open_call(engine.loaded, self.method, residuals=engine.residuals, **options)
            work = stack.enter_context(call)

            def run(part: Part | None) -> Any:
                if part is None:
                    return parts_of(work.plan(), self.workers if work.is_divisible else 1)

                def run_rows(rows: list[int]) -> Any:
                    return work.run_part(rows, part.batch) if work.run_part else work.run(rows)

                return [(rows, pack(result)) for rows, result in run_batches([part.rows], run_rows)]

            yield run


def _engine(resident: Resident, model: ModelFolder) -> TransformersEngine:
    """The worker's engine; one model at a time is held."""
    held: tuple[ModelFolder, TransformersEngine] | None = resident.kept.get("engine")
    if held is None or held[0] != model:
        held = None
        resident.kept.pop("engine", None)
        release_memory()
        model.require_same()
        loaded = load_model(
            model.folder,
            device=choose_device(resident.device),
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
        )
        if model.tokenizer is not None:
            loaded = replace(loaded, tokenizer=load_tokenizer(model.tokenizer))
        held = resident.kept["engine"] = (model, TransformersEngine(loaded))
    return held[1]
