"""The prompt sets by use: directions are extracted from some, and measured on others.

The stage writes the sets as used to work/prompts.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from abliterator.errors import PromptError
from abliterator.files import sha256_of_file
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.prompts import (
    PromptSet,
    check_distinct,
    count_alike,
    count_near,
    drop_near,
    drop_overlap,
    hold_out,
    load_prompts,
)
from abliterator.recipe import Prompts, Recipe, Rollouts, Source
from abliterator.record import Frozen


class PromptSets(Frozen):
    """The prompt sets as used; none of `evaluation` is in `extraction` or `selection`.

    Attributes:
        extraction: "target", "contrast", and "neutral" where directions are projected off a mean of
            neutral prompts that are not the contrast, compared with it, or tuned to leave such
            prompts alone; "protect.NAME" of each protected set.
        evaluation: "target", "neutral", and "over_refusal" where the recipe has it.
        selection: "target" and "neutral", held out of extraction, where layers or k are chosen.
        pairs: indices of a target and a contrast prompt of extraction that differ in the behaviour
            alone, where directions are made of such pairs.
    """

    extraction: dict[str, PromptSet]
    evaluation: dict[str, PromptSet]
    selection: dict[str, PromptSet] = Field(default_factory=dict)
    pairs: tuple[tuple[int, int], ...] = ()


PROMPT_SETS = Artefact("prompts", "work/prompts.json")


def prompt_sets(run: Run) -> PromptSets:
    """The prompt sets as used."""
    return PROMPT_SETS.read_as(run, PromptSets)


def _key(run: Run) -> Any:
    recipe = run.recipe
    files = [s.path for s in recipe.prompts.sources.values() if s.path is not None]
    return [
        recipe.published()["prompts"],
        recipe.directions.projection,
        recipe.seed,
        recipe.selection.prompts if recipe.selects or recipe.tunes else None,
        [recipe.tunes, recipe.directions.stack],
        [sha256_of_file(path) for path in files if path.is_file()],
    ]


def _run(run: Run) -> list[Path]:
    recipe = run.recipe
    sets = divided_sets(recipe)
    if recipe.directions.stack == "within_layer":
        sets = with_pairs(sets, recipe.prompts)
    sets = compared(sets)
    for remark in [*remarks(sets), *short_of_limit(sets, recipe.rollouts)]:
        run.progress.note(remark)
    return [PROMPT_SETS.write(run, sets)]


def divided_sets(
    recipe: Recipe, load: Callable[[str, Source], PromptSet] = load_prompts
) -> PromptSets:
    """The prompt sets of a recipe by use.

    Raises:
        PromptError: for a set that cannot be read, and for sets that share prompts.
    """
    neutral_too = recipe.needs_neutral_mean or recipe.tunes
    sets = load_sets(recipe.prompts, seed=recipe.seed, neutral_too=neutral_too, load=load)
    if recipe.selects or recipe.tunes:
        sets = set_apart(sets, recipe.prompts, prompts=recipe.selection.prompts, seed=recipe.seed)
    return without_near(sets) if recipe.prompts.near_duplicates == "drop" else sets


PROMPTS = Stage("prompts", 5, _key, _run)


def uses(sets: PromptSets) -> Iterator[tuple[str, PromptSet]]:
    """Every set with its kind and use, as in "target, extraction"."""
    for use in ("extraction", "evaluation", "selection"):
        for kind, prompts in getattr(sets, use).items():
            yield f"{kind}, {use}", prompts


def without_near(sets: PromptSets) -> PromptSets:
    """The sets without near duplicates of evaluation prompts in those not measured on.

    Raises:
        PromptError: if none is left of a set.
    """
    return _not_measured_on(sets, lambda part: drop_near(part, sets.evaluation.values()))


def compared(sets: PromptSets) -> PromptSets:
    """The sets, with counts of near duplicates.

    Of those not measured on, near duplicates of evaluation prompts; of the evaluation sets, those
    within the set, which are not two independent measurements.
    """
    near = _not_measured_on(sets, lambda part: count_near(part, sets.evaluation.values()))
    evaluation = {kind: count_alike(prompts) for kind, prompts in sets.evaluation.items()}
    return near.model_copy(update={"evaluation": evaluation})


def _not_measured_on(sets: PromptSets, change: Callable[[PromptSet], PromptSet]) -> PromptSets:
    extraction, selection = (
        {kind: change(prompts) for kind, prompts in part.items()}
        for part in (sets.extraction, sets.selection)
    )
    return sets.model_copy(update={"extraction": extraction, "selection": selection})


def remarks(sets: PromptSets) -> Iterator[str]:
    """A line on each set: its size and source, and how many prompts were dropped."""
    for name, prompts in uses(sets):
        counts = {
            "duplicates or empty, dropped": prompts.dropped
            - prompts.overlap
            - prompts.near_dropped,
            "evaluation prompts too, dropped": prompts.overlap,
            "nearly equal to an evaluation prompt, dropped": prompts.near_dropped,
            "kept though nearly equal to an evaluation prompt": prompts.near,
        }
        asked = f", {prompts.asked} asked for" if prompts.asked else ""
        parts = [
            f"{prompts.read} read{asked}",
            *(f"{n} {reason}" for reason, n in counts.items() if n),
        ]
        yield f"{name}: {len(prompts.prompts)} prompts of {prompts.source} ({'; '.join(parts)})"
        if prompts.alike:
            yield f"{name}: {prompts.alike} prompts nearly equal an earlier one of the set"


def short_of_limit(sets: PromptSets, rollouts: Rollouts) -> Iterator[str]:
    """A line on each evaluation set with fewer prompts than the recipe asks for, if it does."""
    if "limit" not in rollouts.model_fields_set:
        return
    for name, prompts in sets.evaluation.items():
        if (n := len(prompts.prompts)) < (limit := rollouts.limit):
            yield f"{name}, evaluation: {n} of the {limit} prompts that `rollouts.limit` asks for"


def load_sets(
    recipe: Prompts,
    *,
    seed: int,
    neutral_too: bool,
    load: Callable[[str, Source], PromptSet] = load_prompts,
) -> PromptSets:
    """Loads every set, and holds out evaluation prompts of those without an evaluation set.

    Args:
        recipe: the recipe's section.
        seed: of the held-out parts.
        neutral_too: whether extraction needs neutral prompts beside a contrast of its own.
        load: reads one set.

    Raises:
        PromptError: for a set that cannot be read, and for sets that share prompts.
    """
    sets = {name: load(name, source) for name, source in recipe.sources.items()}
    check_distinct(sets["target"], sets["neutral"])
    protected = {name: prompts for name, prompts in sets.items() if name.startswith("protect.")}
    for prompts in protected.values():
        check_distinct(sets["target"], prompts)

    def divided(name: str, evaluation: str) -> tuple[PromptSet, PromptSet]:
        """A set and its evaluation set, which is held out of it where there is none."""
        if evaluation in sets:
            return sets[name], sets[evaluation]
        return hold_out(sets[name], fraction=recipe.holdout, seed=seed)

    extraction, evaluation = {}, {}
    extraction["target"], evaluation["target"] = divided("target", "evaluation")
    if "contrast" in sets:
        extraction["contrast"] = sets["contrast"]
    if "contrast" not in sets or neutral_too:
        role = "neutral" if "contrast" in sets else "contrast"
        extraction[role], evaluation["neutral"] = divided("neutral", "neutral_evaluation")
    else:
        evaluation["neutral"] = sets.get("neutral_evaluation", sets["neutral"])
    if "over_refusal" in sets:
        evaluation["over_refusal"] = sets["over_refusal"]
    extraction |= protected
    for measured in evaluation.values():
        extraction = {name: drop_overlap(s, measured) for name, s in extraction.items()}
    check_distinct(extraction["target"], extraction["contrast"])
    check_distinct(evaluation["target"], evaluation["neutral"])
    return PromptSets(extraction=_named(extraction), evaluation=_named(evaluation))


def set_apart(sets: PromptSets, recipe: Prompts, *, prompts: int, seed: int) -> PromptSets:
    """Holds out the prompts on which layers and k are chosen.

    Target prompts come out of extraction, so that no direction is judged on what it was made from.
    Neutral prompts do too; where extraction has none (the contrast is a set of its own), up to half
    of those of the evaluation are taken, and not measured on any more.

    Args:
        sets: without a selection.
        recipe: the recipe's section; `holdout` is the share of an extraction set, at most.
        prompts: of each kind, at most.
        seed: of the choice.

    Raises:
        PromptError: for a set of one prompt.
    """
    extraction, evaluation = dict(sets.extraction), dict(sets.evaluation)
    selection = {}

    def hold_out_for_selection(
        kind: str, part: dict[str, PromptSet], name: str, *, max_fraction: float
    ) -> None:
        fraction = min(prompts / len(part[name].prompts), max_fraction)
        part[name], selection[kind] = hold_out(part[name], fraction=fraction, seed=seed)

    hold_out_for_selection("target", extraction, "target", max_fraction=recipe.holdout)
    if "neutral" in extraction:
        hold_out_for_selection("neutral", extraction, "neutral", max_fraction=recipe.holdout)
    elif recipe.contrast is None:
        hold_out_for_selection("neutral", extraction, "contrast", max_fraction=recipe.holdout)
    else:
        hold_out_for_selection("neutral", evaluation, "neutral", max_fraction=0.5)
    return PromptSets(
        extraction=_named(extraction), evaluation=_named(evaluation), selection=_named(selection)
    )


def with_pairs(sets: PromptSets, recipe: Prompts) -> PromptSets:
    """Finds the pairs that are left in extraction: those of which neither prompt was held out.

    Args:
        sets: as used.
        recipe: the recipe's section; the n-th contrast prompt belongs to the n-th target prompt.

    Raises:
        PromptError: for sets of two lengths, or with prompts that were dropped, and for no pair.
    """
    assert recipe.contrast is not None  # the recipe's own check
    target, contrast = (
        load_prompts("target", recipe.target),
        load_prompts("contrast", recipe.contrast),
    )
    counts = [len(s.prompts) for s in (target, contrast)]
    if counts[0] != counts[1] or target.dropped or contrast.dropped:
        raise PromptError(
            f"`stack: within_layer` compares the n-th target prompt with the n-th contrast prompt, "
            f"but there are {counts[0]} and {counts[1]} (after {target.dropped} and "
            f"{contrast.dropped} that were dropped). Give two sets of one length, in one order."
        )
    partner = dict(zip(target.prompts, contrast.prompts, strict=True))
    contrast_index = {prompt: i for i, prompt in enumerate(sets.extraction["contrast"].prompts)}
    pairs = tuple(
        (i, contrast_index[partner[prompt]])
        for i, prompt in enumerate(sets.extraction["target"].prompts)
        if partner[prompt] in contrast_index
    )
    if not pairs:
        raise PromptError("No pair of target and contrast prompts is left. Give more of them.")
    return sets.model_copy(update={"pairs": pairs})


def _named(sets: Mapping[str, PromptSet]) -> dict[str, PromptSet]:
    # a held-out part is named after its use, not after its source
    return {name: replace(prompts, name=name) for name, prompts in sets.items()}
