"""Compares two checkpoints: files, weights, judged answers, divergence and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from abliterator.checkpoint import Checkpoint
from abliterator.comparison._answers import behaviour_of, divergence_of, probe_server
from abliterator.comparison._benchmarks import (
    benchmark_fields,
    benchmark_scores,
    conversation_scores,
)
from abliterator.comparison._beside import Setup, differences, same_vocabulary
from abliterator.comparison._markdown import OTHER_VOCABULARY, difference_line
from abliterator.comparison._models import SingleModelLoader
from abliterator.comparison._served import ServedSides
from abliterator.comparison._settings import SIDES, CompareSettings
from abliterator.comparison._weights import diff_weights
from abliterator.devices import enough_memory
from abliterator.evaluation import Bar, no_bar
from abliterator.judge import Judge, RuleJudge
from abliterator.record import Asking, Comparison, Difference, Measurement, Side


@enough_memory("The comparison", smaller="shorter answers (`--max-new-tokens`)")
def compare(
    base: Path,
    edited: Path,
    settings: CompareSettings,
    judge: Judge | None = None,
    *,
    scratch: Path,
    bar: Bar = no_bar,
    note: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Compares two checkpoints; without prompts and tasks, their files and weights alone.

    What differs beside the weights comes first. Where that is the chat template, the tokenizer or
    the stop tokens, both sides are prompted with the base's; where the same id is not the same
    token on both, each is prompted with its own, and no difference between them is computed. One
    model is in memory at a time.

    Args:
        base: checkpoint folder.
        edited: checkpoint folder.
        settings: what is measured.
        judge: of the answers; left out, the rule judge.
        scratch: an empty folder; what is left there can be deleted.
        bar: shows progress.
        note: called with each difference beside the weights, as a line, before any measurement.

    Raises:
        AbliteratorError: if a checkpoint is damaged, or one cannot be measured.
    """
    setups = Setup(Checkpoint.open(base)), Setup(Checkpoint.open(edited))
    beside = differences(*setups)
    for difference in beside:
        note(f"beside the weights: {difference_line(difference)}")
    prompting = _prompting(setups, beside)
    judge = judge or RuleJudge()
    served = None
    if settings.engine.kind != "transformers":
        cache = settings.answers or scratch / "answers.sqlite"
        dtype = settings.benchmarks.dtype
        served = ServedSides(
            setups, settings.engine, cache, settings.vllm, dtype, scratch=scratch, note=note
        )
    folders: dict[Side, Path] = {"base": base, "edited": edited}
    models = SingleModelLoader(
        folders, settings.benchmarks, prompting, served, settings.pool, note=note
    )
    with ExitStack() as stack:
        if served is not None:
            stack.callback(served.close)
        measured = _measured(setups, models, settings, judge, scratch=scratch, bar=bar)
    return Comparison(
        base=base.name,
        edited=edited.name,
        beside=beside,
        asked=prompting,
        engines=served.identities if served else {},
        **measured,
    )


def _measured(
    setups: tuple[Setup, Setup],
    models: SingleModelLoader,
    settings: CompareSettings,
    judge: Judge,
    *,
    scratch: Path,
    bar: Bar,
) -> dict[str, Any]:
    """Fields of a `Comparison` that are measured."""
    prompting = models.prompting
    probe_server(models, settings)
    weights = diff_weights(setups[0].checkpoint, setups[1].checkpoint)
    withheld = _withheld(setups, settings, prompting)
    behaviour = behaviour_of(models, settings, judge, bar)
    divergence = None
    if "divergence" not in withheld:
        divergence = divergence_of(models, settings, scratch=scratch, bar=bar)
    conversations = conversation_scores(models, settings, bar)
    models.free()
    benchmarks = {}
    if settings.tasks:
        scores = benchmark_scores(setups, models, settings, scratch=scratch, bar=bar)
        scores = {side: {**conversations[side], **scores[side]} for side in SIDES}
        benchmarks = benchmark_fields(scores, prompting, seed=settings.seed)
    return {
        "withheld": withheld,
        "weights": weights,
        "behaviour": behaviour,
        "judge": judge.identity if behaviour else None,
        "divergence": divergence,
        **benchmarks,
    }


_PROMPTING_PARTS = {"chat_template", "tokenizer", "stop_tokens", "generation_config"}


def _prompting(setups: tuple[Setup, Setup], beside: Sequence[Difference]) -> Asking:
    """How both sides are prompted, which what differs beside the weights decides."""
    if not _PROMPTING_PARTS & {difference.part for difference in beside}:
        return "alike"
    return "as_base" if same_vocabulary(*setups) else "apart"


def _withheld(
    setups: tuple[Setup, Setup], settings: CompareSettings, prompting: Asking
) -> dict[Measurement, str]:
    """The requested measurements without a difference between the sides, and the reason of each."""
    inputs: dict[Measurement, object] = {
        "behaviour": settings.prompts,
        "divergence": settings.prompts.get("neutral"),
        "benchmarks": settings.tasks,
    }
    if prompting == "apart":
        return {name: OTHER_VOCABULARY for name, value in inputs.items() if value}
    base, edited = (setup.logits for setup in setups)
    if base != edited and inputs["divergence"]:
        return {"divergence": f"the models predict over {base} and {edited} tokens"}
    return {}
