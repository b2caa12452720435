"""Prompt sets: read from a file or a Hub dataset, pinned, without duplicates, split, compared.

A set is known by its prompts (`sha256`) and by where they came from: a dataset at a commit, or a
file. Two prompts are the same prompt when their comparison keys are equal: whatever their case,
spacing, invisible characters, variants of quotes and dashes, and punctuation at the ends of words.
The room does not know what the prompts are for, nor how a model is asked; it never shows a
prompt's text in an error, since some are harmful.

    target = load_prompts("target", PromptSource(path=Path("requests.jsonl"), limit=400))
    training, held_out = hold_out(target, fraction=0.2, seed=0)
    check_distinct(training, load_prompts("neutral", PromptSource(dataset="somebody/questions")))
"""

from __future__ import annotations

from dataclasses import replace

from abliterator.errors import PromptError
from abliterator.prompts._compare import (
    NEAR_DUPLICATE,
    comparison_key,
    near_duplicates,
    normalised,
    similarity,
    trigrams,
)
from abliterator.prompts._file import as_prompt, read_file
from abliterator.prompts._hub import read_dataset, resolve_revision
from abliterator.prompts._sets import (
    PromptSet,
    PromptSource,
    check_distinct,
    count_near,
    drop_overlap,
    hold_out,
)

__all__ = [
    "NEAR_DUPLICATE",
    "PromptSet",
    "PromptSource",
    "as_prompt",
    "check_distinct",
    "comparison_key",
    "count_near",
    "drop_overlap",
    "hold_out",
    "load_prompts",
    "near_duplicates",
    "normalised",
    "resolve_revision",
    "similarity",
    "trigrams",
]


def load_prompts(name: str, source: PromptSource) -> PromptSet:
    """Read a prompt set, strip the prompts, drop duplicates (the first stays), apply the limit.

    A dataset is pinned: whatever `source.revision` says, the result's `revision` is a commit. Its
    split is `train`, and its column the first usual one that it has, unless the source says.

    Raises:
        PromptError: the source contradicts itself, cannot be read, or has nothing usable.
    """
    _check_source(name, source)
    read = read_file(name, source) if source.path else read_dataset(name, source)
    distinct: dict[str, str] = {}
    for prompt in read.prompts:
        distinct.setdefault(comparison_key(prompt), prompt)
    rows = read.dropped + len(read.prompts)
    kept = tuple(distinct.values())[: source.limit]
    return replace(read, prompts=kept, read=rows, dropped=rows - len(distinct))


def _check_source(name: str, source: PromptSource) -> None:
    if (source.path is None) == (source.dataset is None):
        raise PromptError(
            f"The {name} prompts need either a `path` (a local file) or a `dataset` (a Hub id), "
            f"and have {'both' if source.path else 'neither'}."
        )
    of_datasets = {
        "revision": source.revision,
        "config": source.config,
        "split": source.split,
    }
    misplaced = [key for key, value in of_datasets.items() if value is not None]
    if source.path and misplaced:
        raise PromptError(
            f"The {name} prompts come from the file {source.path} and also name a "
            f"{' and a '.join(misplaced)}, which only Hub datasets have: remove that, or give "
            "`dataset` instead of `path`."
        )
    if source.limit is not None and source.limit < 1:
        raise PromptError(
            f"The limit of the {name} prompts is {source.limit}; it must be 1 or more, or left out."
        )
