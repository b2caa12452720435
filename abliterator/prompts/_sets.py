"""Prompt sets as values: identity, splitting, overlap. Pure functions on what was read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import field, replace
from typing import Any

from pydantic import (
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    computed_field,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass

from abliterator.errors import PromptError
from abliterator.files import sha256_of_bytes
from abliterator.prompts._compare import comparison_key, nearly_equal, normalised, repeats
from abliterator.prompts._conversation import Conversation, Prompt


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PromptSet:
    """Prompts as used, in order, never none, and where they came from.

    Raises:
        PromptError: there are no prompts, or stored ones do not fit their digest.
    """

    name: str
    prompts: tuple[Prompt, ...]
    source: str  # Hub dataset id, or file name
    revision: str | None = None  # commit of the dataset
    split: str | None = None
    license: str | None = None  # as the dataset's card states it
    read: int = 0  # prompts in the source, before anything was dropped; 0 where there is none
    asked: int | None = None  # the source's `limit`
    dropped: int = 0  # duplicates, empty rows of a dataset, and overlaps that were removed
    overlap: int = 0  # of those, prompts that are evaluation prompts too
    near: int | None = None  # near duplicates of evaluation prompts, still in; None: not compared
    near_dropped: int = 0  # of those dropped, near duplicates of evaluation prompts
    alike: int | None = None  # near duplicates of an earlier prompt of the set; None: not compared
    # by column ("category"), the group of each prompt; None of a prompt without one
    groups: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    # which prompts resemble each other, by the name of their cluster; None of one by itself
    clusters: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        """Refuses a set without prompts, which nothing can be measured on or learned from."""
        if not self.prompts:
            raise PromptError(
                f"No {self.name} prompts are left of {self.source} ({self.dropped} dropped as "
                "empty, duplicate or overlapping): at least one is needed, so give another source."
            )
        labels = {**self.groups, **({"`cluster`": self.clusters} if self.clusters else {})}
        for column, groups in labels.items():
            if len(groups) != len(self.prompts):
                raise PromptError(
                    f"The {self.name} prompts have {len(groups)} groups in the column {column} "
                    f"and are {len(self.prompts)}: expected one group each."
                )

    def take(self, indices: Sequence[int]) -> PromptSet:
        """The set of the prompts at these indices, in their order, with all that belongs to each.

        Raises:
            PromptError: no index is given.
        """
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in indices),
            groups={
                name: tuple(column[i] for i in indices) for name, column in self.groups.items()
            },
            clusters=tuple(self.clusters[i] for i in indices) if self.clusters else (),
        )

    @model_serializer(mode="wrap")
    def _without_empty_groups(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A set without groups and what came after them is stored as before there were any."""
        values: dict[str, Any] = plain(self)
        return {
            key: v
            for key, v in values.items()
            if key not in _LATER or getattr(self, key) != _LATER[key]
        }

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sha256(self) -> str:
        """Digest of the prompts in their order, whatever they were read from."""
        # not `digest_of`, which escapes what is not ASCII: cards of earlier versions have this form
        listing = json.dumps(
            self.prompts, ensure_ascii=False, separators=(",", ":"), default=Conversation.model_dump
        )
        return sha256_of_bytes(listing.encode())

    @model_validator(mode="wrap")
    @classmethod
    def _fits_its_digest(cls, data: Any, validated: Callable[[Any], PromptSet]) -> PromptSet:
        """Refuses a stored set with other fields or prompts than were written."""
        if not isinstance(data, dict):  # arguments of the constructor
            return validated(data)
        fields = {key: value for key, value in data.items() if key != "sha256"}
        with suppress(ValidationError, UnicodeEncodeError):
            stored = validated(fields)
            if stored.sha256 == data.get("sha256"):
                return stored
        raise PromptError(
            f"The stored prompt set {data.get('name')!r} is damaged or was changed by hand: its "
            "fields or prompts do not fit its sha256. Delete it and load the prompts again."
        )


# fields of later versions, and what they are where there is nothing to store
_LATER: dict[str, Any] = {"groups": {}, "clusters": (), "asked": None, "near_dropped": 0}
_LATER |= {"alike": None}


def hold_out(prompts: PromptSet, *, fraction: float, seed: int) -> tuple[PromptSet, PromptSet]:
    """Split into (training, held-out); the held-out set is called NAME_held_out.

    A prompt's side depends on the seed and on which prompts there are, not on their order, which
    both sides keep. The held-out side gets `fraction` of them, rounded; each side at least one.

    Raises:
        PromptError: fewer than two different prompts, or a fraction that is not inside (0, 1).
    """
    if not 0 < fraction < 1:
        raise PromptError(
            f"The fraction of {prompts.name} prompts to hold out is {fraction}; it must lie "
            "between 0 and 1, both excluded."
        )
    spelling: dict[str, str] = {}  # of each different prompt, the first in the alphabet
    for prompt in prompts.prompts:
        key, form = comparison_key(prompt), normalised(prompt)
        spelling[key] = min(spelling.get(key, form), form)
    ranked = sorted(spelling, key=lambda key: _rank(spelling[key], seed))
    if len(ranked) < 2:
        raise PromptError(
            f"The {prompts.name} prompts from {prompts.source} are only one different prompt, "
            "which cannot be split into training and held-out prompts: give more, or a separate "
            "evaluation set."
        )
    held = set(ranked[: min(max(round(len(ranked) * fraction), 1), len(ranked) - 1)])
    sides: tuple[list[int], list[int]] = ([], [])
    for index, prompt in enumerate(prompts.prompts):
        sides[comparison_key(prompt) in held].append(index)
    training, held_out = map(prompts.take, sides)
    return training, replace(held_out, name=f"{prompts.name}_held_out")


def check_distinct(a: PromptSet, b: PromptSet) -> None:
    """Make sure that no prompt is in both sets, as in target and contrast, which are subtracted.

    Raises:
        PromptError: they are the same prompts, or share some.
    """
    in_a, in_b = _keys(a), _keys(b)
    if in_a.isdisjoint(in_b):
        return
    sets = f"{a.name} prompts (from {a.source}) and the {b.name} prompts (from {b.source})"
    if in_a == in_b:
        raise PromptError(
            f"The {sets} are the same {len(in_a)} prompts, and must be different ones: give one of "
            "the two another source, split or column."
        )
    raise PromptError(
        f"The {sets} share {len(in_a & in_b)} prompts, of {len(in_a)} and {len(in_b)}, and must "
        "have none in common, whatever their case, spacing and punctuation: remove these from one "
        "of the two."
    )


def drop_overlap(training: PromptSet, evaluation: PromptSet) -> PromptSet:
    """The training set without the evaluation set's prompts, counted by `overlap` and `dropped`.

    Raises:
        PromptError: no training prompt is left.
    """
    evaluated = _keys(evaluation)
    remaining = [
        index
        for index, prompt in enumerate(training.prompts)
        if comparison_key(prompt) not in evaluated
    ]
    if not remaining:
        raise PromptError(
            f"All {len(training.prompts)} {training.name} prompts (from {training.source}) are "
            f"also {evaluation.name} prompts (from {evaluation.source}), so none is left to learn "
            "from: give one of the two another source or split."
        )
    removed = len(training.prompts) - len(remaining)
    return replace(
        training.take(remaining),
        dropped=training.dropped + removed,
        overlap=training.overlap + removed,
    )


def count_near(training: PromptSet, evaluations: Iterable[PromptSet]) -> PromptSet:
    """The training set with `near`: the number of near duplicates of evaluation prompts.

    They are kept: a request for 7 hours is not the request for 6. `nearly_equal` defines them.
    """
    evaluated = [prompt for evaluation in evaluations for prompt in evaluation.prompts]
    return replace(training, near=len(nearly_equal(training.prompts, evaluated)))


def count_alike(prompts: PromptSet) -> PromptSet:
    """The set with `alike`: how many of its prompts are near duplicates of an earlier one."""
    return replace(prompts, alike=len(repeats(prompts.prompts)))


def drop_near(training: PromptSet, evaluations: Iterable[PromptSet]) -> PromptSet:
    """The training set without near duplicates of evaluation prompts, which are counted.

    Raises:
        PromptError: no training prompt is left.
    """
    evaluated = [prompt for evaluation in evaluations for prompt in evaluation.prompts]
    near = set(nearly_equal(training.prompts, evaluated))
    remaining = [index for index in range(len(training.prompts)) if index not in near]
    if not remaining:
        raise PromptError(
            f"All {len(near)} {training.name} prompts (from {training.source}) nearly equal an "
            "evaluation prompt, so none is left: set `prompts.near_duplicates: keep`, or give "
            "other prompts."
        )
    return replace(
        training.take(remaining),
        dropped=training.dropped + len(near),
        near_dropped=training.near_dropped + len(near),
    )


def _keys(prompts: PromptSet) -> set[str]:
    return {comparison_key(prompt) for prompt in prompts.prompts}


def _rank(form: str, seed: int) -> str:
    return sha256_of_bytes(f"{seed}\n{form}".encode())
