"""The answers of base and edited to the evaluation prompts.

The stage writes work/rollouts.jsonl (greedy), work/samples.jsonl where the recipe has
`rollouts.samples`, and work/engines.json where not this process answered. The answers of a side,
greedy or drawn, are kept while its inputs do not change.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

from abliterator.files import Journal, digest_of, write_text_atomic
from abliterator.pipeline._engines import probe_engines
from abliterator.pipeline._kept import KeptAnswers, partial_file
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.prompts import prompt_sets
from abliterator.record import Completion, EngineIdentity, SampledCompletion, Side

if TYPE_CHECKING:
    from abliterator.engines import Sampling

Answered = TypeVar("Answered", bound=Completion)

SIDES: tuple[Side, ...] = get_args(Side)
VERSION = 3  # of the stage, and of the answers of one side that it may keep


ANSWERS = Artefact("rollouts", "work/rollouts.jsonl")
SAMPLES = Artefact("rollouts", "work/samples.jsonl")  # where the recipe has `rollouts.samples`
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
            run.recipe.rollouts.greedy.model_dump(mode="json"),
            {name: s.sha256 for name, s in prompt_sets(run).evaluation.items()},
            run.dtype,
            *run.answers_depend_on(),
        ]
    )


def _drawn(side: Side) -> str:
    """The name of a side's drawn answers among the parts of the stage."""
    return f"{side}, drawn"


def _keys(run: Run) -> dict[str, str]:
    """Keys of the answers of each side, greedy and drawn."""
    keys = _side_keys(run)
    if run.recipe.rollouts.samples:
        keys |= {_drawn(side): _drawn_key(run, side) for side in SIDES}
    return keys


def _drawn_key(run: Run, side: Side) -> str:
    return digest_of([_side_key(run, side), run.section("rollouts")])


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
    parts = ROLLOUTS.kept(run)
    answers = _kept(run, parts, ANSWERS, Completion, {side: str(side) for side in SIDES})
    drawn = _kept(run, parts, SAMPLES, SampledCompletion, {side: _drawn(side) for side in SIDES})
    samples = run.recipe.rollouts.samples
    missing = [s for s in SIDES if s not in answers or (samples and s not in drawn)]
    engines = engines_of(run, set(SIDES) - set(missing))
    # each side is another vLLM's, and that of the base is asked by the next stage too
    in_turn = [[side] for side in reversed(missing)]
    for sides in in_turn if run.recipe.engine.kind == "vllm" else [missing]:
        engines |= probe_engines(run, {side: folder_of(run, side) for side in sides})
        if engines:
            run.free()  # no weights are needed here, and a server beside this process needs memory
        for side in sides:
            answers[side] = answers.get(side) or _answers(run, side)
            drawn[side] = drawn.get(side) or _samples(run, side)
    written = [ANSWERS.write_lines(run, (c for side in SIDES for c in answers[side]))]
    if samples:
        written.append(SAMPLES.write_lines(run, (c for side in SIDES for c in drawn[side])))
    if engines:
        plain = {side: engines[side].model_dump(mode="json") for side in SIDES if side in engines}
        write_text_atomic(ENGINES.path(run), json.dumps(plain, indent=1) + "\n")
        written.append(ENGINES.path(run))
    return written


def _kept(
    run: Run,
    parts: Collection[str],
    artefact: Artefact,
    kind: type[Answered],
    names: Mapping[Side, str],
) -> dict[Side, list[Answered]]:
    """Answers of an earlier run that did not change, by side; `names` are those of the parts."""
    sides = [side for side, name in names.items() if name in parts]
    lines = artefact.read_lines(run, kind) if sides else []
    return {side: [line for line in lines if line.side == side] for side in sides}


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


def _samples(run: Run, side: Side) -> list[SampledCompletion]:
    """One side's drawn answers: to every prompt, the first ones before the second ones."""
    from abliterator.engines import Sampling

    settings = run.recipe.rollouts
    drawn = settings.model_dump(include={"temperature", "top_p", "seed"})
    return [
        SampledCompletion(**answer.model_dump(), sample=sample)
        for sample in range(settings.samples)
        for answer in _answers(run, side, Sampling(**drawn, sample=sample))
    ]


def _answers(run: Run, side: Side, sampling: Sampling | None = None) -> list[Completion]:
    from abliterator.evaluation import answer_sets, completions_of, kept_answers

    settings = run.recipe.rollouts
    key, name = _side_key(run, side), f"{side}.jsonl"
    if sampling is not None:
        key, name = _drawn_key(run, side), f"{side}-drawn{sampling.sample}.jsonl"
    journal = Journal(partial_file(run, "rollouts", name, key))
    sets = {name: s.prompts[: settings.limit] for name, s in prompt_sets(run).evaluation.items()}
    answered = {name: KeptAnswers(journal, name) for name in sets}
    finished = {name: kept_answers(prompts, answered[name]) for name, prompts in sets.items()}
    is_whole = settings.thinking_tokens is None  # else it may go on behind the thinking
    if is_whole and all(transcripts is not None for transcripts in finished.values()):
        return [  # without the model
            completion
            for name, prompts in sets.items()
            for completion in completions_of(
                finished[name] or (), prompts, set_name=name, side=side
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
        sampling=sampling,
        answered=answered,
        continued={name: KeptAnswers(journal, f"{name}, continued") for name in sets},
        render=lambda name, prompts: (
            run.render(engine, prompts, name=name, max_new_tokens=settings.most_tokens).token_ids
        ),
    )


ROLLOUTS = Stage("rollouts", VERSION, _keys, _run, parts=_keys, asks_model=True)
