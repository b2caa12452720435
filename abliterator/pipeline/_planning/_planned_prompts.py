"""The prompt sets of a recipe before anything is downloaded: counted, and measured in tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from abliterator.costs import spread
from abliterator.errors import AbliteratorError
from abliterator.files import sha256_of_bytes
from abliterator.pipeline._planning._template_tokens import template_tokens
from abliterator.pipeline.stages.prompts import (
    PromptSets,
    compared,
    divided_sets,
    short_of_limit,
    uses,
)
from abliterator.prompts import PromptSet, load_prompts, readable
from abliterator.recipe import Recipe, Rollouts, Source

# Rows of splits that recipes name by default; others are known only where a slice says them.
_KNOWN_ROWS = {
    ("mlabonne/harmful_behaviors", "train"): 416,
    ("mlabonne/harmful_behaviors", "test"): 104,
}
ASSUMED_ROWS = 400
# Tokens of a prompt of a dataset that is not at hand: AdvBench's and Alpaca's have 12 to 20.
ASSUMED_TOKENS = 16
_CHARACTERS_A_TOKEN = 4  # of English text
_SLICE = re.compile(r"^(\w+)\[(\d*):(\d*)\]$")


@dataclass(frozen=True)
class PlannedPrompts:
    """The prompt sets as a build will divide them, as far as they are known.

    Attributes:
        lengths: tokens of every prompt with its chat template, by set ("target, extraction"); of
            sets that are not at hand, an assumed number of assumed lengths.
        before: tokens with which all prompts begin.
        around: tokens of the chat template around every prompt, those included.
        assumed: datasets whose number of rows is assumed.
        sets: the prompts that are at hand; stand-ins of others.
        problems: errors of sets that cannot be read, and what is wrong with them together.
    """

    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    before: int = 0
    around: int = 0
    assumed: tuple[str, ...] = ()
    sets: PromptSets | None = None
    problems: tuple[str, ...] = ()

    def of(self, name: str, use: str, limit: int | None = None) -> tuple[int, ...]:
        """Lengths of one set, the first `limit` of them; none where there is no such set."""
        return self.lengths.get(f"{name}, {use}", ())[:limit]

    def counts(self) -> dict[str, dict[str, int]]:
        """Prompts of every set and their tokens, for `--json` and for people."""
        return {
            name: {"prompts": len(lengths), "tokens": sum(lengths)}
            for name, lengths in self.lengths.items()
        }

    def remarks(self, rollouts: Rollouts) -> Iterator[str]:
        """Lines on near duplicates, and on evaluation sets that fall short of their limit."""
        if self.sets is None:
            return
        yield from _near(compared(self.sets))
        if not self.assumed:
            yield from short_of_limit(self.sets, rollouts)


def planned_prompts(recipe: Recipe, folder: Path) -> PlannedPrompts:
    """Reads the local prompt files of a recipe, and counts its datasets by what the recipe says.

    Args:
        recipe: whose prompts are planned.
        folder: of the model, for its chat template.
    """
    sources = recipe.prompts.sources
    problems = []
    for name, source in sources.items():
        try:
            if source.path is not None:
                load_prompts(name, source)
        except AbliteratorError as error:
            problems.append(str(error))
    if problems:
        return PlannedPrompts(problems=tuple(problems))
    assumed = tuple(
        dict.fromkeys(s.dataset for s in sources.values() if s.dataset and _rows(s) is None)
    )
    try:
        sets = divided_sets(recipe, _loaded_or_counted)
    except AbliteratorError as error:
        return PlannedPrompts(problems=(str(error),))
    around = template_tokens(folder, recipe.chat)
    lengths = _lengths(sets, recipe, sum(around))
    return PlannedPrompts(lengths, around.before, sum(around), assumed, sets)


def _near(sets: PromptSets) -> Iterator[str]:
    """A line on each set with near duplicates."""
    for name, prompts in uses(sets):
        of = f"Of {len(prompts.prompts) + prompts.near_dropped} prompts ({name}),"
        if prompts.near_dropped:
            yield f"{of} {prompts.near_dropped} nearly equal an evaluation prompt and are dropped."
        if prompts.near:
            yield (
                f"{of} {prompts.near} nearly equal an evaluation prompt: figures on what was not "
                "seen may be too good. `prompts.near_duplicates: drop` leaves them out."
            )
        if prompts.alike and name.endswith("evaluation"):
            yield (
                f"{of} {prompts.alike} nearly equal an earlier one: they count as one measurement "
                "each. Intervals take groups of such prompts into account where a column names "
                "them (`cluster`)."
            )


def _loaded_or_counted(name: str, source: Source) -> PromptSet:
    """The prompts of a local file; of a dataset as many numbered stand-ins as it has rows."""
    if source.path is not None:
        return load_prompts(name, source)
    rows = min(_rows(source) or ASSUMED_ROWS, source.limit or ASSUMED_ROWS * 1000)
    # hashes, since no two of them may resemble each other
    names = (f"{name} {number}" for number in range(max(2, rows)))
    stand_ins = tuple(sha256_of_bytes(text.encode()) for text in names)
    return PromptSet(name=name, prompts=stand_ins, source=str(source.dataset))


def _rows(source: Source) -> int | None:
    """Rows of a dataset's split, where its name or its slice says so."""
    split = source.split or "train"
    whole = _KNOWN_ROWS.get((str(source.dataset), split.partition("[")[0]))
    if match := _SLICE.fullmatch(split):
        start = int(match[2] or 0)
        end = int(match[3]) if match[3] else whole
        return None if end is None else max(0, end - start)
    return whole or (source.limit if source.limit else None)


def _lengths(sets: PromptSets, recipe: Recipe, around: int) -> dict[str, tuple[int, ...]]:
    datasets = {source.dataset for source in recipe.prompts.sources.values()} - {None}

    def tokens(prompts: PromptSet) -> list[int]:
        if prompts.source in datasets:
            return spread(ASSUMED_TOKENS, len(prompts.prompts))
        return [
            max(1, round(len(readable(prompt)) / _CHARACTERS_A_TOKEN)) for prompt in prompts.prompts
        ]

    return {name: tuple(around + n for n in tokens(prompts)) for name, prompts in uses(sets)}
