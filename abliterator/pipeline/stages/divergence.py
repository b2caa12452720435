"""The stage that compares the two sides' distributions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.files import digest_of, read_text, write_text_atomic
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage, kept_parts, save_value
from abliterator.pipeline.stages.prompts import prompt_sets
from abliterator.pipeline.stages.rollouts import folder_of
from abliterator.record import Divergence

if TYPE_CHECKING:
    from abliterator.comparison import DivergenceSettings
    from abliterator.divergence import AnswerPath
    from abliterator.model import LoadedModel


def _divergence_inputs(run: Run) -> Any:
    return [_base_key(run), run.digest("bake")]


def _base_key(run: Run) -> str:
    recipe = run.recipe
    return digest_of(
        [
            run.base_digest(),
            recipe.chat.model_dump(mode="json"),
            recipe.divergence.model_dump(mode="json"),
            prompt_sets(run).evaluation["neutral"].sha256,
            run.dtype,
            recipe.seed,
        ]
    )


def _divergence(run: Run) -> tuple[list[Path], Parts]:
    from abliterator.comparison import DivergenceSettings, measure_divergence

    recipe, work = run.recipe, run.workspace.work
    settings = DivergenceSettings(
        tokens=recipe.divergence.tokens,
        batch_size=run.batch_size,
        max_batch_tokens=recipe.capture.max_batch_tokens,
        seed=recipe.seed,
    )
    parts = {"base": _base_key(run)}
    paths_file = work / "divergence_paths.json"
    if not kept_parts(run, "divergence", parts):
        _write_paths(run, settings, paths_file)
    found = measure_divergence(
        lambda side: run.loaded(folder_of(run, side)),
        lambda loaded: _rendered(run, loaded),
        settings,
        scratch=work / "base_logits.bin",
        paths=_read_paths(paths_file),
        bar=run.progress.bar,
    )
    return [save_value(_result_path(run), found), paths_file], parts


def _result_path(run: Run) -> Path:
    return run.workspace.work / "divergence.json"


def divergence_of(run: Run) -> Divergence:
    """How far the two sides' distributions are apart."""
    path = run.artefact("divergence", _result_path(run))
    return Divergence.model_validate_json(read_text(path))


def _rendered(run: Run, loaded: LoadedModel) -> list[list[int]]:
    settings = run.recipe.divergence
    asked = prompt_sets(run).evaluation["neutral"].prompts[: settings.limit]
    return run.render(loaded, asked, name="neutral", max_new_tokens=settings.tokens)


def _write_paths(run: Run, settings: DivergenceSettings, file: Path) -> None:
    from abliterator.comparison import answer_paths

    base = run.loaded(folder_of(run, "base"))
    paths = answer_paths(base, _rendered(run, base), settings, bar=run.progress.bar)
    write_text_atomic(file, json.dumps(paths) + "\n")


def _read_paths(file: Path) -> list[AnswerPath]:
    from abliterator.divergence import AnswerPath

    return [AnswerPath(tuple(ids), positions) for ids, positions in json.loads(read_text(file))]


DIVERGENCE = Stage("divergence", 2, _divergence_inputs, _divergence)
