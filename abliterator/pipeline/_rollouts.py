"""The stage that lets both sides answer, and the first tokens of their answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from abliterator.checkpoint import write_bytes_atomic, write_text_atomic
from abliterator.pipeline._extraction import prompt_sets
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage, kept_parts
from abliterator.pipeline._workspace import digest_of
from abliterator.record import Completion, Side

if TYPE_CHECKING:
    from torch import Tensor

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
        loaded = run.loaded(folder_of(run, side))
        answers[side] = _answers(run, loaded, side)
        logprobs[side] = _first_tokens(run, loaded, side)
    lines = [c.model_dump_json() + "\n" for side in SIDES for c in answers[side]]
    write_text_atomic(answers_path, "".join(lines))
    write_bytes_atomic(tokens_path, save(logprobs))
    return [answers_path, tokens_path], parts


def folder_of(run: Run, side: Side) -> Path:
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


ROLLOUTS = Stage("rollouts", 1, _rollouts_inputs, _rollouts)
