"""Columns of a prompt file or dataset that divide its prompts into groups, such as categories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from abliterator.errors import PromptError

if TYPE_CHECKING:
    from abliterator.recipe import Source

USUAL_GROUPS = ("category", "language")
"""Columns that become groups where a source does not name any."""

MOST_GROUPS = 50  # different values of a column
LONGEST_NAME = 60  # characters of a value, which cards show


def group_columns(source: Source) -> tuple[str, ...]:
    """The columns that may divide the prompts of a source into groups."""
    return USUAL_GROUPS if source.groups is None else source.groups


def read_groups(
    values: Mapping[str, Sequence[object]], source: Source, origin: str
) -> dict[str, tuple[str | None, ...]]:
    """The group of each row by column; None for a row without one.

    A column that the source names has to be fit for groups; a usual one that is not is left out.

    Args:
        values: of every row, by column; None where a row has none.
        source: whose `groups` name the columns, or do not.
        origin: of the rows, for messages.

    Raises:
        PromptError: a named column is not there, or holds something else than names of groups.
    """
    columns = {}
    for column, cells in values.items():
        groups = tuple(map(_name, cells))
        problem = _problem(cells, groups)
        if problem is None:
            columns[column] = groups
        elif source.groups is not None:
            raise PromptError(
                f"{origin}: the column {column} of `groups` {problem}. A column of groups holds "
                f"names: at most {MOST_GROUPS} different ones of up to {LONGEST_NAME} characters, "
                "or numbers. Name another, or leave it out."
            )
    return columns


def read_clusters(cells: Sequence[object], source: Source, origin: str) -> tuple[str | None, ...]:
    """The cluster of each row, from the column that the source names; None for a row without one.

    Args:
        cells: of that column.
        source: whose `cluster` names it.
        origin: of the rows, for messages.

    Raises:
        PromptError: the column is missing, empty, or holds something else than names.
    """
    clusters = tuple(map(_name, cells))
    if not any(clusters) or any(
        cell is not None and not isinstance(cell, str | int | float) for cell in cells
    ):
        raise PromptError(
            f"{origin}: the column {source.cluster} of `cluster` is missing, empty, or holds "
            "something else than names or numbers. Name another, or leave it out."
        )
    return clusters


def _name(cell: object) -> str | None:
    """A group's name on one line; None of an empty cell."""
    if isinstance(cell, bool):
        return str(cell).lower()
    text = " ".join(str(cell).split()) if isinstance(cell, (str, int, float)) else ""
    return text or None


def _problem(cells: Iterable[object], groups: Sequence[str | None]) -> str | None:
    """Why a column cannot be one of groups; no message quotes a cell, which may be a prompt."""
    scalars = str | int | float | None
    if others := {type(cell).__name__ for cell in cells if not isinstance(cell, scalars)}:
        return f"has cells of type {min(others)}"
    names = {name for name in groups if name is not None}
    if not names:
        return "is missing or empty"
    if len(names) > MOST_GROUPS:
        return f"has {len(names)} different values"
    if (longest := max(map(len, names))) > LONGEST_NAME:
        return f"has a value of {longest} characters"
    return None
