"""The stage that lets both sides answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from abliterator.files import as_lines, digest_of, read_lines, write_text_atomic
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage, kept_parts
from abliterator.pipeline.stages.prompts import prompt_sets
from abliterator.record import Completion, Side

if TYPE_CHECKING:
    from abliterator.model import LoadedModel


SIDES: tuple[Side, ...] = get_args(Side)
VERSION = 3  # of the stage, and of the answers of one side that it may keep


def _rollouts_inputs(run: Run) -> Any:
    return {side: _side_key(run, side) for side in SIDES}


def _side_key(run: Run, side: Side) -> str:
    recipe = run.recipe
    return digest_of(
        [
            VERSION,
            run.base_digest(),
            run.digest("bake") if side == "edited" else None,
            recipe.chat.model_dump(mode="json"),
            recipe.rollouts.model_dump(mode="json"),
            {name: s.sha256 for name, s in prompt_sets(run).evaluation.items()},
            run.dtype,
        ]
    )


def _rollouts(run: Run) -> tuple[list[Path], Parts]:
    answers_path = _answers_path(run)
    parts: dict[str, str] = {side: _side_key(run, side) for side in SIDES}
    kept = kept_parts(run, "rollouts", parts)
    answers = {side: [c for c in completions(run) if c.side == side] for side in kept}
    for side in [side for side in SIDES if side not in kept]:
        # No name for the model here: it would keep the base in memory while the edited is loaded.
        answers[side] = _answers(run, run.loaded(folder_of(run, side)), side)
    lines = (c.model_dump_json() for side in SIDES for c in answers[side])
    write_text_atomic(answers_path, as_lines(lines))
    return [answers_path], parts


def _answers_path(run: Run) -> Path:
    return run.workspace.work / "rollouts.jsonl"


def folder_of(run: Run, side: Side) -> Path:
    """The checkpoint of a side, whose files are those that were planned or made."""
    if side == "base":
        run.base_files()
        return run.plan.source.folder
    for stage in ("bake", "config"):
        run.digest(stage)
    return run.workspace.checkpoint


def _answers(run: Run, loaded: LoadedModel, side: Side) -> list[Completion]:
    from abliterator.generation import answer_sets

    settings = run.recipe.rollouts
    asked = {
        name: prompts.prompts[: settings.limit]
        for name, prompts in prompt_sets(run).evaluation.items()
    }
    return answer_sets(
        loaded,
        {
            name: (
                prompts,
                run.render(loaded, prompts, name=name, max_new_tokens=settings.max_new_tokens),
            )
            for name, prompts in asked.items()
        },
        side=side,
        max_new_tokens=settings.max_new_tokens,
        batch_size=run.batch_size,
        bar=run.progress.bar,
    )


def completions(run: Run) -> list[Completion]:
    """All answers, base and edited."""
    lines = read_lines(run.artefact("rollouts", _answers_path(run)))
    return [Completion.model_validate_json(line) for line in lines]


ROLLOUTS = Stage("rollouts", VERSION, _rollouts_inputs, _rollouts)
