"""The routed experts that are edited, where not all of them are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from abliterator.anatomy import Writer
from abliterator.errors import RecipeError, UnsupportedModel
from abliterator.recipe import ranges_of

Indices = tuple[int, ...]
ExpertSelection = Indices | Mapping[int, Indices | None]
"""Experts of every block that has some, or of each block named: None for all of that block."""


def experts_of_blocks(
    writers: Sequence[Writer], shapes: Mapping[str, Sequence[int]], chosen: ExpertSelection
) -> dict[int, Indices | None]:
    """The chosen experts of each block, sorted; None for all. Of a block left out, none are edited.

    Args:
        writers: all of the model.
        shapes: of the stored tensors, by name.
        chosen: of every block, or by block.

    Raises:
        RecipeError: for a model or a block without routed experts, and an expert that a block does
            not have; it says how many there are.
        UnsupportedModel: where all experts of a block are one matrix.
    """
    counts = _counts(writers, shapes)
    if not counts:
        raise RecipeError(
            "`edit.experts` chooses among routed experts, and the model has none. Leave it out."
        )
    by_block = chosen if isinstance(chosen, Mapping) else dict.fromkeys(counts, chosen)
    selected: dict[int, Indices | None] = {}
    for block, experts in by_block.items():
        if block not in counts:
            raise RecipeError(
                f"`edit.experts` names block {block}, which has no routed experts; blocks "
                f"{', '.join(ranges_of(dict.fromkeys(counts)))} have. Name these alone."
            )
        beyond = [e for e in experts or () if not 0 <= e < counts[block]]
        if beyond:
            raise RecipeError(
                f"`edit.experts` names expert {beyond[0]} of block {block}, which has "
                f"{counts[block]}: 0 to {counts[block] - 1}."
            )
        selected[block] = experts if experts is None else tuple(sorted(experts))
    return selected


def share_edited(writer: Writer, chosen: Mapping[int, Indices | None] | None) -> Indices | None:
    """The chosen experts of a writer: None where it is edited whole, () where it is not edited.

    Args:
        writer: of any component; those that are no experts are edited whole.
        chosen: from `experts_of_blocks`; None where nothing is chosen.
    """
    if chosen is None or writer.component != "expert":
        return None
    selected = chosen.get(writer.layer, ())
    if selected is None or writer.expert is None:
        return selected
    return None if writer.expert in selected else ()


def _counts(writers: Sequence[Writer], shapes: Mapping[str, Sequence[int]]) -> dict[int, int]:
    """Number of experts of each block that has experts."""
    counts: dict[int, int] = defaultdict(int)
    for writer in writers:
        if writer.component != "expert" or writer.kind != "weight":
            continue
        if writer.expert is None and not writer.fused:
            raise UnsupportedModel(
                f"`edit.experts` cannot choose in {writer.name}: all experts of a block are one "
                "matrix there. Leave `edit.experts` out, which edits all of them."
            )
        counts[writer.layer] += 1 if writer.expert is not None else shapes[writer.name][0]
    return dict(counts)
