"""Prompt sets: read from a file or a Hub dataset, pinned, without duplicates, split, compared.

A prompt is a text, or a conversation that a model continues (`Conversation`).
A set is identified by its prompts (`sha256`) and its origin: a dataset at a commit, or a file. Two
prompts are the same prompt when their comparison keys are equal: whatever their case, spacing,
invisible characters, variants of quotes and dashes, and punctuation at the ends of words. This
package depends neither on the use of the prompts nor on a model. No error quotes a prompt,
since some are harmful.

    target = load_prompts("target", Source(path=Path("requests.jsonl"), limit=400))
    training, held_out = hold_out(target, fraction=0.2, seed=0)
    check_distinct(training, load_prompts("neutral", Source(dataset="somebody/questions")))
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from abliterator.prompts._compare import (
    NEAR_DUPLICATE,
    NEAR_WORDS,
    comparison_key,
    near_duplicates,
    nearly_equal,
    normalised,
    repeats,
    similarity,
    trigrams,
)
from abliterator.prompts._conversation import (
    Conversation,
    Prompt,
    as_read,
    next_turn,
    readable,
    turns_of,
    user_text,
)
from abliterator.prompts._file import as_prompt, read_file
from abliterator.prompts._hub import read_dataset, resolve_revision
from abliterator.prompts._sets import (
    PromptSet,
    check_distinct,
    count_alike,
    count_near,
    drop_near,
    drop_overlap,
    hold_out,
)

if TYPE_CHECKING:
    from abliterator.recipe import Source

__all__ = [
    "NEAR_DUPLICATE",
    "NEAR_WORDS",
    "Conversation",
    "Prompt",
    "PromptSet",
    "as_prompt",
    "as_read",
    "check_distinct",
    "comparison_key",
    "count_alike",
    "count_near",
    "drop_near",
    "drop_overlap",
    "hold_out",
    "load_prompts",
    "near_duplicates",
    "nearly_equal",
    "next_turn",
    "normalised",
    "readable",
    "repeats",
    "resolve_revision",
    "similarity",
    "trigrams",
    "turns_of",
    "user_text",
]


def load_prompts(name: str, source: Source) -> PromptSet:
    """Read a prompt set, strip the prompts, drop duplicates (the first stays), apply the limit.

    A dataset is pinned: whatever `source.revision` says, the result's `revision` is a commit. Its
    split is `train`, and its column the first usual one that it has, unless the source says. The
    columns of `source.groups`, or `category` and `language` where it is None, become groups.

    Raises:
        PromptError: the source cannot be read, or has nothing usable.
    """
    source_set = read_file(name, source) if source.path else read_dataset(name, source)
    distinct: dict[str, int] = {}
    for index, prompt in enumerate(source_set.prompts):
        distinct.setdefault(comparison_key(prompt), index)
    rows = source_set.dropped + len(source_set.prompts)
    used = source_set.take([*distinct.values()][: source.limit])
    dropped = rows - len(distinct)
    return replace(used, read=rows, asked=source.limit, dropped=dropped)
