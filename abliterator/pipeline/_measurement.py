"""The stages that measure both sides: rollouts, judge, divergence, benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from abliterator.checkpoint import write_bytes_atomic, write_text_atomic
from abliterator.pipeline._extraction import prompt_sets
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage, kept_parts, save_value
from abliterator.pipeline._workspace import digest_of
from abliterator.record import Completion, Divergence, Estimate, Side, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.benchmarks import TaskScores
    from abliterator.model import LoadedModel

SIDES: tuple[Side, ...] = get_args(Side)


def _rollouts_inputs(run: Run) -> Any:
    return {side: _side_key(run, side) for side in SIDES}


def _side_key(run: Run, side: Side) -> str:
    recipe = run.recipe
    return digest_of(
        [
            run.base_digest(),
            run.digest("bake") if side == "edited" else None,
            recipe.chat.model_dump(mode="json"),
            recipe.rollouts.model_dump(mode="json"),
            recipe.divergence.model_dump(mode="json"),
            {name: s.sha256 for name, s in prompt_sets(run).evaluation.items()},
            run.dtype,
        ]
    )


def _rollouts(run: Run) -> tuple[list[Path], Parts]:
    from safetensors.torch import load_file, save

    answers_path = run.workspace.work / "rollouts.jsonl"
    tokens_path = run.workspace.work / "first_token.safetensors"
    parts: dict[str, str] = {side: _side_key(run, side) for side in SIDES}
    kept = kept_parts(run, "rollouts", parts)
    answers = {side: [c for c in completions(run) if c.side == side] for side in kept}
    logprobs = {side: load_file(tokens_path)[side] for side in kept}
    for side in [side for side in SIDES if side not in kept]:
        loaded = run.loaded(_folder(run, side))
        answers[side] = _answers(run, loaded, side)
        logprobs[side] = _first_tokens(run, loaded, side)
    lines = [c.model_dump_json() + "\n" for side in SIDES for c in answers[side]]
    write_text_atomic(answers_path, "".join(lines))
    write_bytes_atomic(tokens_path, save(logprobs))
    return [answers_path, tokens_path], parts


def _folder(run: Run, side: Side) -> Path:
    return run.plan.source.folder if side == "base" else run.workspace.checkpoint


def _answers(run: Run, loaded: LoadedModel, side: Side) -> list[Completion]:
    from abliterator.generation import generate, stop_ids

    settings = run.recipe.rollouts
    found = []
    for name, prompts in prompt_sets(run).evaluation.items():
        asked = prompts.prompts[: settings.limit]
        with run.progress.bar(f"{side} answers, {name}", len(asked)) as advance:
            answers = generate(
                loaded,
                run.render(loaded, asked),
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                # those of the base: its config and tokenizer are in the edited folder byte for byte
                stop_ids=stop_ids(loaded),
                on_batch=advance,
            )
        for index, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
            found.append(
                Completion(
                    set=name,
                    side=side,
                    index=index,
                    prompt=prompt,
                    response=answer.text,
                    finish_reason=answer.finish_reason,
                    n_tokens=len(answer.token_ids),
                )
            )
    return found


def completions(run: Run) -> list[Completion]:
    """All answers, base and edited."""
    text = (run.workspace.work / "rollouts.jsonl").read_text()
    return [Completion.model_validate_json(line) for line in text.splitlines()]


def _first_tokens(run: Run, loaded: LoadedModel, side: Side) -> Tensor:
    from abliterator.divergence import first_token_logprobs

    asked = prompt_sets(run).evaluation["neutral"].prompts[: run.recipe.divergence.limit]
    with run.progress.bar(f"{side} first tokens, neutral", len(asked)) as advance:
        return first_token_logprobs(
            loaded,
            run.render(loaded, asked),
            max_batch_tokens=run.recipe.capture.max_batch_tokens,
            on_batch=advance,
        )


def _divergence_inputs(run: Run) -> Any:
    return [run.digest("rollouts"), run.recipe.seed]


def _divergence(run: Run) -> tuple[list[Path], Parts]:
    from safetensors.torch import load_file

    from abliterator.divergence import kl_divergence, top1_agreement
    from abliterator.statistics import mean_interval, rate_interval

    tokens = load_file(run.workspace.work / "first_token.safetensors")
    kl = kl_divergence(tokens["base"], tokens["edited"]).tolist()
    agree = top1_agreement(tokens["base"], tokens["edited"])
    found = Divergence(
        kl_first_token=estimate(mean_interval(kl, seed=run.recipe.seed)),
        top1_agreement=estimate(rate_interval(int(agree.sum()), len(agree))),
    )
    return [save_value(run.workspace.work / "divergence.json", found)], {}


def estimate(interval: Any) -> Estimate | None:
    """A statistic as it travels in the record."""
    return None if interval is None else Estimate.model_validate(interval._asdict())


def _judge_inputs(run: Run) -> Any:
    from abliterator.judge import RuleJudge

    return [
        run.digest("rollouts"),
        run.recipe.judge.model_dump(mode="json"),
        RuleJudge().identity.model_dump(mode="json"),
    ]


def _judge(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.judge import RuleJudge, judge_completions

    verdicts = judge_completions(completions(run), RuleJudge())
    path = run.workspace.work / "verdicts.jsonl"
    write_text_atomic(path, "".join(verdict.model_dump_json() + "\n" for verdict in verdicts))
    return [path], {}


def verdicts_of(run: Run) -> list[Verdict]:
    """All verdicts, base and edited."""
    text = (run.workspace.work / "verdicts.jsonl").read_text()
    return [Verdict.model_validate_json(line) for line in text.splitlines()]


def _benchmarks_inputs(run: Run) -> Any:
    return {side: _benchmarks_key(run, side) for side in SIDES}


def _benchmarks_key(run: Run, side: Side) -> str:
    return digest_of(
        [
            run.base_digest(),
            run.digest("bake") if side == "edited" else None,
            run.recipe.published()["benchmarks"],
            {task.name: task.digest for task in run.tasks},
            run.dtype,
        ]
    )


def _benchmarks(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.benchmarks import run_tasks

    settings = run.recipe.benchmarks
    paths = {side: run.workspace.work / "benchmarks" / f"{side}.json" for side in SIDES}
    parts: dict[str, str] = {side: _benchmarks_key(run, side) for side in paths}
    if not run.tasks:
        return [], parts
    run.free()
    kept = kept_parts(run, "benchmarks", parts)
    for side in [side for side in SIDES if side not in kept]:
        with run.progress.bar(f"{side} benchmarks", len(run.tasks)) as advance:
            scores = run_tasks(
                _folder(run, side),
                run.tasks,
                batch_size=settings.batch_size,
                limit=settings.limit,
                chat_template=settings.chat_template,
                num_fewshot=settings.num_fewshot,
                device=run.device,
                dtype=run.dtype,
            )
            advance(len(run.tasks))
        plain = {name: score.model_dump(mode="json") for name, score in scores.items()}
        write_text_atomic(paths[side], json.dumps(plain, indent=1) + "\n")
    return list(paths.values()), parts


def task_scores(run: Run, side: Side) -> dict[str, TaskScores]:
    """Scores of every task on one side; none where no task was run."""
    from abliterator.benchmarks import TaskScores

    path = run.workspace.work / "benchmarks" / f"{side}.json"
    if not run.tasks:
        return {}
    return {k: TaskScores.model_validate(v) for k, v in json.loads(path.read_text()).items()}


ROLLOUTS = Stage("rollouts", 1, _rollouts_inputs, _rollouts)
JUDGE = Stage("judge", 1, _judge_inputs, _judge)
DIVERGENCE = Stage("divergence", 1, _divergence_inputs, _divergence)
BENCHMARKS = Stage("benchmarks", 1, _benchmarks_inputs, _benchmarks)
