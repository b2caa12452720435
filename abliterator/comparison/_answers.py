"""Judged answers of two checkpoints, and the divergence along those of the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from abliterator.comparison._models import SingleModelLoader
from abliterator.comparison._settings import SIDES, CompareSettings
from abliterator.engines import Engine, ServedEngine, require_two_models
from abliterator.evaluation import (
    Bar,
    RenderedPrompts,
    answer_sets,
    base_paths,
    measure_divergence,
)
from abliterator.judge import Judge, judge_completions, summarise
from abliterator.prompts import Prompt
from abliterator.record import Behaviour, BehaviourSide, Completion, Divergence, Side


def behaviour_of(
    models: SingleModelLoader, settings: CompareSettings, judge: Judge, bar: Bar
) -> dict[str, Behaviour]:
    """Judged answers of both sides by prompt set; without a difference where prompts differ."""
    if not settings.prompts:
        return {}
    answers = [answer for side in SIDES for answer in _answers(models, side, settings, bar)]
    if judge.identity.kind == "local" and settings.pool is None:
        models.free()  # the judge needs the room
    verdicts = judge_completions(answers, judge)
    behaviours = {
        name: summarise(
            *([v for v in verdicts if (v.set, v.side) == (name, side)] for side in SIDES),
            seed=settings.seed,
        )
        for name in settings.prompts
    }
    if models.prompting != "apart":
        return behaviours
    no_difference = {
        "delta": BehaviourSide(**dict.fromkeys(BehaviourSide.model_fields)),
        "smallest_detectable": {},
        "p_value": {},
    }
    return {name: b.model_copy(update=no_difference) for name, b in behaviours.items()}


def _answers(
    models: SingleModelLoader, side: Side, settings: CompareSettings, bar: Bar
) -> list[Completion]:
    engine, limit = models.answering(side), settings.max_new_tokens
    rendered = {
        name: RenderedPrompts(prompts, _rendered(engine, prompts, name, limit))
        for name, prompts in settings.prompts.items()
    }
    models.probe(
        side, [ids for s in rendered.values() for ids in s.token_ids], max_new_tokens=limit
    )
    return answer_sets(
        engine,
        rendered,
        side=side,
        max_new_tokens=limit,
        batch_size=settings.batch_size,
        bar=bar,
        stop_ids=models.stop_ids,
        render=lambda name, prompts: _rendered(engine, prompts, name, limit),
    )


def probe_server(models: SingleModelLoader, settings: CompareSettings) -> None:
    """Checks both models of a running server, hours before the second is needed."""
    if settings.engine.kind == "server" and settings.prompts:
        probed = []
        for side in SIDES:
            engine = models.answering(side)
            assert isinstance(engine, ServedEngine)
            limit = settings.max_new_tokens
            prompts = [
                ids
                for name, texts in settings.prompts.items()
                for ids in _rendered(engine, texts, name, limit)
            ]
            models.probe(side, prompts, max_new_tokens=limit)
            probed.append(engine.probed(max(prompts, key=len), max_new_tokens=limit))
        require_two_models(*probed)


def _rendered(
    engine: Engine, prompts: Sequence[Prompt], name: str, max_new_tokens: int
) -> list[list[int]]:
    from abliterator.model import render_prompts

    return render_prompts(
        engine.tokenizer, prompts, engine.limits, name=name, max_new_tokens=max_new_tokens
    )


def divergence_of(
    models: SingleModelLoader, settings: CompareSettings, *, scratch: Path, bar: Bar
) -> Divergence | None:
    """Divergence on the neutral prompts; None without any."""
    neutral = settings.prompts.get("neutral")
    if not neutral:
        return None
    tokens = settings.kl_tokens

    def rendered(engine: Engine) -> list[list[int]]:
        return _rendered(engine, neutral, "neutral", tokens)

    paths = base_paths(
        models.answering("base"),
        rendered(models.answering("base")),
        tokens=tokens,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        bar=bar,
    )
    return measure_divergence(
        models.load,
        rendered,
        paths,
        tokens=tokens,
        scratch=scratch / "base_logits.bin",
        max_batch_tokens=settings.max_batch_tokens,
        seed=settings.seed,
        bar=bar,
    )
