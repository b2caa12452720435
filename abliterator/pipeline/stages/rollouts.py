"""The answers of base and edited to the evaluation prompts.

The stage writes work/rollouts.jsonl and, where not this process answered, work/engines.json. The
answers of a side are kept while its inputs do not change.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import get_args

from abliterator.files import Journal, digest_of, write_text_atomic
from abliterator.pipeline._engines import probe_engines
from abliterator.pipeline._kept import KeptAnswers, partial_file
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.prompts import prompt_sets
from abliterator.record import Completion, EngineIdentity, Side

SIDES: tuple[Side, ...] = get_args(Side)
VERSION = 3  # of the stage, and of the answers of one side that it may keep


ANSWERS = Artefact("rollouts", "work/rollouts.jsonl")
ENGINES = Artefact("rollouts", "work/engines.json")  # by side, of engines of other processes


def _side_keys(run: Run) -> dict[str, str]:
    return {side: _side_key(run, side) for side in SIDES}


def _side_key(run: Run, side: Side) -> str:
    return digest_of(
        [
            VERSION,
            run.base_digest(),
            run.digest("bake") if side == "edited" else None,
            run.section("chat"),
            run.section("rollouts"),
            {name: s.sha256 for name, s in prompt_sets(run).evaluation.items()},
            run.dtype,
            *run.answers_depend_on(),
        ]
    )


def probe_base(run: Run) -> None:
    """Checks the recipe's server, if it has to answer for the base.

    Raises:
        ServerError: if it cannot be used, or serves another model.
    """
    marker = run.workspace.marker(ROLLOUTS.name)
    is_kept = marker is not None and marker.parts.get("base") == _side_key(run, "base")
    if run.recipe.engine.kind == "server" and not is_kept:
        probe_engines(run, {"base": run.plan.source.folder})


def _run(run: Run) -> list[Path]:
    kept_sides = ROLLOUTS.kept(run)
    kept = ANSWERS.read_lines(run, Completion) if kept_sides else []
    answers = {side: [c for c in kept if c.side == side] for side in kept_sides}
    missing = [side for side in SIDES if side not in kept_sides]
    engines = engines_of(run, kept_sides)
    # each side is another vLLM's, and that of the base is asked by the next stage too
    in_turn = [[side] for side in reversed(missing)]
    for sides in in_turn if run.recipe.engine.kind == "vllm" else [missing]:
        engines |= probe_engines(run, {side: folder_of(run, side) for side in sides})
        if engines:
            run.free()  # no weights are needed here, and a server beside this process needs memory
        answers |= {side: _answers(run, side) for side in sides}
    written = [ANSWERS.write_lines(run, (c for side in SIDES for c in answers[side]))]
    if engines:
        plain = {side: engines[side].model_dump(mode="json") for side in SIDES if side in engines}
        write_text_atomic(ENGINES.path(run), json.dumps(plain, indent=1) + "\n")
        written.append(ENGINES.path(run))
    return written


def engines_of(run: Run, sides: Collection[str] = SIDES) -> dict[Side, EngineIdentity]:
    """What answered for each side, where it was not this process."""
    marker = run.workspace.marker(ROLLOUTS.name)
    if marker is None or ENGINES.name not in marker.artefacts:
        return {}
    stored = ENGINES.read(run)
    return {
        side: EngineIdentity.model_validate(stored[side])
        for side in SIDES
        if side in sides and side in stored
    }


def folder_of(run: Run, side: Side) -> Path:
    """The checkpoint of a side, whose files are those that were planned or made."""
    if side == "base":
        run.base_files()
        return run.plan.source.folder
    for stage in ("bake", "config"):
        run.digest(stage)
    return run.workspace.checkpoint


def _answers(run: Run, side: Side) -> list[Completion]:
    from abliterator.evaluation import answer_sets, as_completions

    settings = run.recipe.rollouts
    journal = Journal(partial_file(run, "rollouts", f"{side}.jsonl", _side_key(run, side)))
    sets = {name: s.prompts[: settings.limit] for name, s in prompt_sets(run).evaluation.items()}
    answered = {name: KeptAnswers(journal, name) for name in sets}
    is_whole = settings.thinking_tokens is None  # else it may go on behind the thinking
    if is_whole and all(len(answered[name]) == len(prompts) for name, prompts in sets.items()):
        return [  # without the model
            completion
            for name, prompts in sets.items()
            for completion in as_completions(
                [answered[name][i] for i in range(len(prompts))], prompts, set_name=name, side=side
            )
        ]
    engine = run.answering(folder_of(run, side), side)
    return answer_sets(
        engine,
        {
            name: run.render(engine, prompts, name=name, max_new_tokens=settings.most_tokens)
            for name, prompts in sets.items()
        },
        side=side,
        max_new_tokens=settings.max_new_tokens,
        thinking_tokens=settings.thinking_tokens,
        batch_size=run.batch_size,
        bar=run.progress.bar,
        answered=answered,
        continued={name: KeptAnswers(journal, f"{name}, continued") for name in sets},
    )


ROLLOUTS = Stage("rollouts", VERSION, _side_keys, _run, parts=_side_keys, asks_model=True)
