"""One command's measurements of quantised forms of a build.

Each format is made of base and edited, answers the build's target prompts, and is compared with
what it was made from. What is not to be kept is deleted as soon as it was measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from abliterator.checkpoint import Checkpoint
from abliterator.errors import QuantizationError
from abliterator.files import Journal, digest_of
from abliterator.pipeline._judges import evaluation_judge
from abliterator.pipeline._kept import KeptAnswers, partial_file
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Stage
from abliterator.pipeline._survival._results import survival_file, survival_stage
from abliterator.pipeline._workspace import remove_whole
from abliterator.pipeline.stages.directions import removed_subspace
from abliterator.pipeline.stages.divergence import answer_paths
from abliterator.pipeline.stages.judge import VERDICTS
from abliterator.pipeline.stages.prompts import prompt_sets
from abliterator.pipeline.stages.rollouts import SIDES, folder_of
from abliterator.record import Completion, Divergence, Side, Survival, SurvivingStrength, Verdict
from abliterator.survival import (
    LlamaCpp,
    QuantizedFormat,
    commands,
    convert,
    gguf_type,
    llama_server,
    quantize,
    require_package,
    rounding_of,
    surviving_strengths,
    write_numbers,
    write_rounded,
)

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.engines import AnswerPath, Engine
    from abliterator.evaluation import LogitFile, PathDivergence
    from abliterator.prompts import Prompt

_TARGET = "target"
_SLOTS = 4  # prompts that llama.cpp's server answers at a time


class _Form(NamedTuple):
    """One side in one format."""

    numbers: Path | None  # a model folder with its numbers; None where they cannot be read
    gguf: Path | None
    n_bytes: int
    withheld: str | None = None


class _Compared:
    """Logits of one pass, compared with those of several files as they are handed on.

    Attributes:
        of: for each file, the divergence from it by index of a path.
    """

    def __init__(
        self,
        files: Sequence[LogitFile],
        paths: Sequence[AnswerPath],
        logits: Iterator[tuple[int, Tensor]],
    ) -> None:
        self.of: list[dict[int, PathDivergence]] = [{} for _ in files]
        self._files, self._paths, self._logits = files, paths, logits

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for index, rows in self._logits:
            for file, compared in zip(self._files, self.of, strict=True):
                compared[index] = file.compare(self._paths, [(index, rows)])[index]
            yield index, rows


class _Measured(NamedTuple):
    """What was measured of one side in one format."""

    form: _Form
    answers: list[Completion]
    rounding: Divergence | None = None  # from the side as it was built
    divergence: Divergence | None = None  # from the base in the format
    strengths: tuple[SurvivingStrength, ...] = ()


@dataclass
class SurvivalSession:
    """The formats that one command measures, and what they share.

    Attributes:
        run: of the finished build.
        tools: llama.cpp, where a format is its.
        limit: prompts of each set at most; None for all of the build's.
        keep: keep the quantised files in OUT/work/survival/files.
    """

    run: Run
    tools: LlamaCpp | None
    limit: int | None
    keep: bool = False
    _built: dict[Side, LogitFile] = field(default_factory=dict)
    _is_begun: bool = False

    def stage(self, entry: QuantizedFormat) -> Stage:
        """The stage of a format."""
        return survival_stage(entry.name, self.limit, partial(self._measure, entry))

    @property
    def scratch(self) -> Path:
        """Folder of what is deleted at the end."""
        return self.run.workspace.work / "survival" / "scratch"

    def clean(self) -> None:
        """Deletes what is not to be kept; nothing of another run that has the folder."""
        if self._is_begun:
            remove_whole(self.scratch)

    @cached_property
    def _paths(self) -> list[AnswerPath]:
        return answer_paths(self.run)[: self.limit]

    @cached_property
    def _log(self) -> Path:
        return self.run.workspace.work / "survival" / "llama_cpp.log"

    @cached_property
    def _tool(self) -> str:
        assert self.tools is not None
        return self.tools.version

    def _measure(self, entry: QuantizedFormat, run: Run) -> list[Path]:
        from abliterator.evaluation import LogitFile
        from abliterator.judge import judge_completions, summarise

        if not self._is_begun:
            remove_whole(self.scratch)  # of a run that was killed
            self._is_begun = True
        self.scratch.mkdir(parents=True, exist_ok=True)
        judge, seed = evaluation_judge(run), run.recipe.seed
        measured: dict[Side, _Measured] = {}
        with LogitFile(self.scratch / "in_format.bin") as logits:
            for side in SIDES:
                measured[side] = self._side(entry, side, logits)
        answered = {side: measured[side].answers for side in SIDES}
        verdicts = {side: judge_completions(answered[side], judge) for side in SIDES}
        built = {side: self._built_verdicts(side, len(answered[side])) for side in SIDES}
        edited = measured["edited"]
        result = Survival(
            format=entry.name,
            **self._described(entry),
            limit=self.limit,
            bytes=edited.form.n_bytes,
            bytes_built=Checkpoint.open(run.workspace.checkpoint).total_bytes,
            built=summarise(built["base"], built["edited"], seed=seed),
            behaviour=summarise(verdicts["base"], verdicts["edited"], seed=seed),
            change={s: summarise(built[s], verdicts[s], seed=seed).delta for s in SIDES},
            divergence=edited.divergence,
            rounding={s: m.rounding for s, m in measured.items() if m.rounding is not None},
            strengths=edited.strengths,
            withheld=edited.form.withheld,
        )
        return [survival_file(entry.name).write(run, result)]

    def _described(self, entry: QuantizedFormat) -> dict[str, Any]:
        if entry.tool == "llama.cpp":
            kind = gguf_type(self._stored_dtype)
            return {
                "label": entry.label,
                "tool": self._tool,
                "commands": commands(entry.name, kind),
                "answered_by": f"{self._tool}, llama-server",
            }
        return {
            "label": rounding_of(self.run.plan.checkpoint, entry).label,
            "tool": require_package(),
            "commands": (f"abliterator survive OUT --as {entry.name} --keep",),
            "answered_by": "transformers, from the numbers that the format stores",
        }

    @property
    def _stored_dtype(self) -> str:
        tensors = self.run.plan.checkpoint.tensors.values()
        return max(tensors, key=lambda info: info.nbytes).dtype

    def _side(self, entry: QuantizedFormat, side: Side, logits: LogitFile) -> _Measured:
        """Everything of one side; the base's distributions are written to `logits`."""
        from abliterator.subspace import is_by_writer

        run = self.run
        built = self._built_logits(side)  # before, since one model is in memory at a time
        with self._form(entry, side) as form:
            answers = self._answers(entry, side, form)
            if form.numbers is None:
                return _Measured(form, answers)
            engine = run.engine(form.numbers)
            if side == "base":
                compared = _Compared([built], self._paths, self._logits(engine))
                logits.write(self._paths, compared)
                return _Measured(form, answers, self._summary(compared.of[0]))
            compared = _Compared([built, logits], self._paths, self._logits(engine))
            deque(compared, maxlen=0)
            rounding, divergence = map(self._summary, compared.of)
            base, basis = folder_of(run, "base"), removed_subspace(run).basis
            strengths: tuple[SurvivingStrength, ...] = ()
            if not is_by_writer(basis):  # with U and V there is no subspace to measure along
                strengths = surviving_strengths(base, run.workspace.checkpoint, form.numbers, basis)
            return _Measured(form, answers, rounding, divergence, strengths)

    def _logits(self, engine: Engine) -> Iterator[tuple[int, Tensor]]:
        limit = self.run.recipe.capture.max_batch_tokens
        return engine.logits(self._paths, max_batch_tokens=limit)

    def _summary(self, compared: Mapping[int, PathDivergence]) -> Divergence:
        from abliterator.evaluation import summarise_divergence

        recipe = self.run.recipe
        paths = [compared[index] for index in range(len(self._paths))]
        return summarise_divergence(paths, tokens=recipe.divergence.tokens, seed=recipe.seed)

    def _built_logits(self, side: Side) -> LogitFile:
        """The distributions of a side as it was built."""
        from abliterator.evaluation import LogitFile

        if side not in self._built:
            file = LogitFile(self.scratch / f"{side}.bin")
            with self.run.progress.bar(f"distributions, {side} as built", 0):
                file.write(self._paths, self._logits(self.run.engine(folder_of(self.run, side))))
            self._built[side] = file
        return self._built[side]

    def _built_verdicts(self, side: Side, n: int) -> list[Verdict]:
        verdicts = VERDICTS.read_lines(self.run, Verdict)
        return [v for v in verdicts if (v.set, v.side) == (_TARGET, side) and v.index < n]

    @contextmanager
    def _form(self, entry: QuantizedFormat, side: Side) -> Iterator[_Form]:
        """One side in a format, as files that are deleted afterwards unless they are kept."""
        kept = self.run.workspace.work / "survival" / "files"
        files = (kept if self.keep else self.scratch) / entry.name / side
        numbers = self.scratch / f"{entry.name}, {side}"
        for folder in (files, numbers):
            remove_whole(folder)
        make = self._rounded if entry.tool == "compressed-tensors" else self._gguf
        try:
            with self.run.progress.bar(f"{entry.name} of {side}", 0):
                form = make(entry, side, files, numbers)
            yield form
        finally:
            self.run.free()
            remove_whole(numbers)
            if not self.keep:
                remove_whole(files)

    def _rounded(self, entry: QuantizedFormat, side: Side, files: Path, numbers: Path) -> _Form:
        rounding = rounding_of(self.run.plan.checkpoint, entry)
        source = Checkpoint.open(folder_of(self.run, side))
        return _Form(numbers, None, write_rounded(source, rounding, files, numbers))

    def _gguf(self, entry: QuantizedFormat, side: Side, files: Path, numbers: Path) -> _Form:
        assert self.tools is not None
        self.run.free()  # converter and quantiser need memory
        source = Checkpoint.open(folder_of(self.run, side))
        plain, kind = self.scratch / f"{side}.gguf", gguf_type(self._stored_dtype)
        if not plain.exists():
            convert(self.tools, source.folder, plain, kind=kind, log=self._log)
        files.mkdir(parents=True)
        gguf = files / f"{side}-{entry.name}.gguf"
        quantize(self.tools, plain, gguf, kind=entry.name, log=self._log)
        try:
            write_numbers(source, gguf, numbers)
        except QuantizationError as error:
            self.run.progress.note(f"{entry.name}: no divergence and no strengths. {error}")
            return _Form(None, gguf, gguf.stat().st_size, str(error))
        return _Form(numbers, gguf, gguf.stat().st_size)

    def _answers(self, entry: QuantizedFormat, side: Side, form: _Form) -> list[Completion]:
        """Answers to the target prompts; those of an interrupted run are kept."""
        from abliterator.evaluation import as_completions

        run, stage = self.run, self.stage(entry)
        prompts = self._prompts
        key = [stage.key(run), side, self._tool if form.gguf else None]
        journal = Journal(partial_file(run, stage.name, f"{side}.jsonl", key))
        answered = KeptAnswers(journal, _TARGET)
        if n_missing := len(prompts) - len(answered):
            token_ids = self._rendered(side)
            with (
                self._answering(entry, side, form, token_ids, digest_of(key)) as engine,
                run.progress.bar(f"{entry.name} answers, {side}", n_missing) as advance,
            ):
                engine.answers(
                    token_ids,
                    max_new_tokens=run.recipe.rollouts.max_new_tokens,
                    batch_size=run.batch_size,
                    answered=answered,
                    on_batch=advance,
                )
        answers = [answered[i] for i in range(len(prompts))]
        return as_completions(answers, prompts, set_name=_TARGET, side=side)

    @property
    def _prompts(self) -> Sequence[Prompt]:
        run = self.run
        prompts = prompt_sets(run).evaluation[_TARGET].prompts[: run.recipe.rollouts.limit]
        return prompts[: self.limit]

    def _rendered(self, side: Side) -> list[list[int]]:
        from abliterator.model import load_tokenizer, render_prompts, stored_limits

        folder, recipe = folder_of(self.run, side), self.run.recipe
        trusted = recipe.trust_remote_code
        return render_prompts(
            load_tokenizer(folder, trust_remote_code=trusted),
            self._prompts,
            stored_limits(folder, trust_remote_code=trusted),
            name=_TARGET,
            max_new_tokens=recipe.rollouts.max_new_tokens,
            **recipe.chat.model_dump(include={"system", "template_kwargs"}),
        )

    @contextmanager
    def _answering(
        self,
        entry: QuantizedFormat,
        side: Side,
        form: _Form,
        token_ids: Sequence[Sequence[int]],
        identity: str,
    ) -> Iterator[Engine]:
        """What answers in the format: llama.cpp's server, or this process with its numbers."""
        if form.gguf is None:
            assert form.numbers is not None
            yield self.run.engine(form.numbers)
            return
        from abliterator.engines import CompletionClient, ServedByName, ServedEngine
        from abliterator.model import load_tokenizer
        from abliterator.recipe import EngineSettings

        assert self.tools is not None
        run, folder, name = self.run, folder_of(self.run, side), f"{side}-{entry.name}"
        context = max(map(len, token_ids)) + run.recipe.rollouts.max_new_tokens + 1
        tokenizer = load_tokenizer(folder, trust_remote_code=run.recipe.trust_remote_code)
        with llama_server(
            self.tools, form.gguf, name=name, context=context, slots=_SLOTS, log=self._log
        ) as address:
            settings = EngineSettings(
                kind="server",
                base_url=address,
                base=name,
                concurrency=_SLOTS,
                parameters={"cache_prompt": False},  # which changes the rounding of answers
            )
            client = CompletionClient(
                settings.server("base", model=name),
                tokenizer,
                cache=run.workspace.work / "survival" / "answers.sqlite",
            )
            served = ServedByName(client, name, identity)
            yield ServedEngine(folder, tokenizer, served, lambda: run.engine(folder))
