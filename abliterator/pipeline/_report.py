"""The report on builds, from the artefacts of their folders.

Every artefact is compared with its marker before it is read; nothing is measured again but the size
of each tensor's change, for which both checkpoints are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.checkpoint import Checkpoint
from abliterator.errors import OutputError
from abliterator.files import read_text, write_text_atomic
from abliterator.pipeline._progress import Progress, Silent
from abliterator.pipeline._stage import Artefact
from abliterator.pipeline._workspace import Workspace, usable
from abliterator.pipeline.stages.bake import TENSOR_EDITS
from abliterator.pipeline.stages.directions import SUBSPACE
from abliterator.pipeline.stages.judge import IDENTITY, VERDICTS
from abliterator.pipeline.stages.prompts import PROMPT_SETS, PromptSets
from abliterator.pipeline.stages.record import RECORD_JSON, read_record
from abliterator.pipeline.stages.rollouts import ANSWERS
from abliterator.record import Completion, JudgeIdentity, TensorEdit, Verdict
from abliterator.source import folder_on_disk
from abliterator.verification import read_edits

if TYPE_CHECKING:
    from abliterator.benchmarks import TaskScores
    from abliterator.report import Build, SamplePair

REPORT = "work/report.html"
SEVERAL = "work/report_models.html"  # on several builds, in the folder of the first


@dataclass
class _Finished:
    """A folder whose build is over, from which artefacts are read."""

    workspace: Workspace


def write_report(
    folders: Sequence[Path], path: Path | None = None, *, progress: Progress | None = None
) -> Path:
    """Writes the HTML report on one build, or across several; returns its path.

    Args:
        folders: output folders of finished builds, at least one.
        path: of the report; by default in `work` of the first folder, which is never published.
        progress: shows which tensors are read.

    Raises:
        OutputError: if a folder has no finished build, an artefact was changed since, or the report
            would lie among files that may be published.
    """
    from abliterator.report import render_report

    path = path or folders[0] / (REPORT if len(folders) == 1 else SEVERAL)
    for folder in folders:
        for public in (folder / "checkpoint", folder / "adapter"):
            if path.resolve().is_relative_to(public.resolve()):
                raise OutputError(
                    f"{path} would lie in {public}, which may be published, and a report holds "
                    "prompts and answers. Choose another --out."
                )
    names = _names(folders)
    builds = [
        _build(folder, name, progress or Silent())
        for folder, name in zip(folders, names, strict=True)
    ]
    with usable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, render_report(builds))
    return path


def _names(folders: Sequence[Path]) -> list[str]:
    """The last name of each folder, or the whole path where two would be the same."""
    names = [folder.resolve().name for folder in folders]
    is_distinct = len(set(names)) == len(names)
    return names if is_distinct else [folder.as_posix() for folder in folders]


def _build(folder: Path, name: str, progress: Progress) -> Build:
    from abliterator.report import Build

    with usable(folder):
        workspace = Workspace(folder)
        recipe, finished = workspace.recipe(), _Finished(workspace)
        read_record(folder)  # says what to do where there is none
        try:
            answers = ANSWERS.read_lines(finished, Completion)
            verdicts = VERDICTS.read_lines(finished, Verdict)
            judge = IDENTITY.read_as(finished, JudgeIdentity)
            TENSOR_EDITS.checked(finished)
            return Build(
                name=name,
                record_text=read_text(RECORD_JSON.checked(finished)),
                answers=answers,
                verdicts=verdicts,
                by_rules=_by_rules(judge, answers),
                edits=(edits := read_edits(workspace.checkpoint)),
                changes=_changes(workspace, edits, progress),
                gates=recipe.selection.model_dump(include={"max_kl", "min_induce"}),
                cosines=_cosines(SUBSPACE.checked(finished)),
                groups={
                    name: prompts.groups
                    for name, prompts in PROMPT_SETS.read_as(
                        finished, PromptSets
                    ).evaluation.items()
                },
                flipped=_flipped(finished),
            )
        except ValueError as error:  # pydantic's, of an artefact of another version
            raise OutputError(
                f"{folder} was built by a version of abliterator whose files this one does not "
                f"read ({str(error).splitlines()[0]}). Give the same `abliterator build` again."
            ) from error


def _by_rules(judge: JudgeIdentity, answers: Sequence[Completion]) -> Sequence[Verdict]:
    """Verdicts of the rule judge, where another one judged."""
    if judge.kind == "rules":
        return ()
    from abliterator.judge import RuleJudge, judge_completions

    return judge_completions(answers, RuleJudge())


def _changes(
    workspace: Workspace, edits: Sequence[TensorEdit], progress: Progress
) -> Mapping[str, float]:
    """|W' - W| / |W| of the edited tensors; none where the base is not on this machine."""
    from abliterator.comparison import relative_changes

    recipe = workspace.recipe()
    base = folder_on_disk(recipe.model, revision=recipe.revision)
    if base is None:
        progress.note(f"{recipe.model} is not on this machine: sizes of changes are left out.")
        return {}
    sizes = {}
    with progress.bar("tensors", len(edits)) as advance:
        for name, size in relative_changes(
            Checkpoint.open(base), Checkpoint.open(workspace.checkpoint), edits
        ):
            advance(1)
            if size is not None:
                sizes[name] = size
    return sizes


def _cosines(path: Path) -> list[list[float]]:
    """Cosines [L, L] between the directions of all layers; 0 of one without length."""
    import torch
    from safetensors.torch import load_file

    vectors = torch.nn.functional.normalize(load_file(path)["directions"].double(), dim=1)
    cosines: list[list[float]] = (vectors @ vectors.T).clamp(-1, 1).tolist()
    return cosines


def _flipped(finished: _Finished) -> dict[str, list[SamplePair]]:
    """Documents of each benchmark task whose value is not the same on both sides."""
    from abliterator.benchmarks import TaskScores

    marker = finished.workspace.marker("benchmarks")
    by_side: dict[str, dict[str, TaskScores]] = {"base": {}, "edited": {}}
    for name in marker.artefacts if marker else ():
        scores = TaskScores.model_validate(Artefact("benchmarks", name).read(finished)["scores"])
        by_side[Path(name).parent.name][scores.task] = scores
    return {
        task: _pairs(base, by_side["edited"][task])
        for task, base in by_side["base"].items()
        if task in by_side["edited"]
    }


def _pairs(base: TaskScores, edited: TaskScores) -> list[SamplePair]:
    from abliterator.report import SamplePair

    others = {(s.doc_id, s.filter): s for s in edited.scores}
    return [
        SamplePair(
            s.doc_id,
            s.filter,
            s.value,
            other.value,
            s.gold_loglik,
            other.gold_loglik,
            s.text,
            other.text,
        )
        for s in base.scores
        if (other := others.get((s.doc_id, s.filter))) is not None and other.value != s.value
    ]
