"""KL of the edited next-token distributions from the base's, on neutral prompts.

The stage writes work/divergence.json, and the base's answers along which it is measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.files import digest_of, read_text, write_text_atomic
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.prompts import prompt_sets
from abliterator.pipeline.stages.rollouts import folder_of

if TYPE_CHECKING:
    from abliterator.engines import AnswerPath, Engine


DIVERGENCE_JSON = Artefact("divergence", "work/divergence.json")
PATHS = Artefact("divergence", "work/divergence_paths.json")  # the base's greedy answers


def _key(run: Run) -> Any:
    return [_base_key(run), run.digest("bake")]


def _parts(run: Run) -> dict[str, str]:
    return {"base": _base_key(run)}


def _base_key(run: Run) -> str:
    return digest_of(
        [
            run.base_digest(),
            run.section("chat"),
            run.section("divergence"),
            run.recipe.rollouts.most_thinking,
            prompt_sets(run).evaluation["neutral"].sha256,
            run.dtype,
            run.recipe.seed,
            *run.answers_depend_on(),
        ]
    )


def _run(run: Run) -> list[Path]:
    from abliterator.evaluation import measure_divergence

    if not DIVERGENCE.kept(run):
        _write_paths(run)
    divergence = measure_divergence(
        lambda side: run.engine(folder_of(run, side)),
        lambda engine: _rendered(run, engine),
        answer_paths(run),
        tokens=run.recipe.divergence.tokens,
        scratch=run.workspace.work / "base_logits.bin",
        max_batch_tokens=run.recipe.capture.max_batch_tokens,
        seed=run.recipe.seed,
        bar=run.progress.bar,
    )
    return [DIVERGENCE_JSON.write(run, divergence), PATHS.path(run)]


def _rendered(run: Run, engine: Engine) -> list[list[int]]:
    settings = run.recipe.divergence
    prompts = prompt_sets(run).evaluation["neutral"].prompts[: settings.limit]
    rendered = run.render(engine, prompts, name="neutral", max_new_tokens=settings.tokens)
    return [list(ids) for ids in rendered.token_ids]


def _write_paths(run: Run) -> None:
    from abliterator.evaluation import base_paths

    base = run.answering(folder_of(run, "base"))
    paths = base_paths(
        base,
        _rendered(run, base),
        tokens=run.recipe.divergence.tokens,
        max_new_tokens=run.recipe.rollouts.most_thinking,
        batch_size=run.batch_size,
        bar=run.progress.bar,
    )
    write_text_atomic(PATHS.path(run), json.dumps(paths) + "\n")


def answer_paths(run: Run) -> list[AnswerPath]:
    """The base's greedy answers along which the divergence is measured."""
    from abliterator.engines import AnswerPath

    return [
        AnswerPath(tuple(ids), positions)
        for ids, positions in json.loads(read_text(PATHS.path(run)))
    ]


DIVERGENCE = Stage("divergence", 3, _key, _run, parts=_parts, asks_model=True)
