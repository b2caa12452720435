"""How large the change of each edited tensor is, computed from the files of both checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from abliterator.checkpoint import Checkpoint
from abliterator.comparison._stored import Side
from abliterator.files import sha256_of_bytes
from abliterator.record import TensorEdit


def relative_changes(
    base: Checkpoint, edited: Checkpoint, edits: Iterable[TensorEdit]
) -> Iterator[tuple[str, float | None]]:
    """Yields the name of each edit with |W' - W| / |W|, Frobenius norms of the decoded tensors.

    It is None where the tensor of `base` is not the one that was edited, where a side cannot be
    decoded, or where W is 0. One pair of tensors is in memory at a time.
    """
    before, after = Side(base), Side(edited)
    names = {before.stored_name(name): name for name in before.layouts}
    for edit in edits:
        name = edit.name if edit.name in before.layouts else names.get(edit.name)
        is_base = name is not None and edit.sha256_before == sha256_of_bytes(
            base.read(before.stored_name(name))
        )
        is_there = is_base and name in after.layouts
        yield edit.name, _relative_change(before, after, name) if name and is_there else None


def _relative_change(before: Side, after: Side, name: str) -> float | None:
    numbers, changed = before.numbers(name), after.numbers(name)
    if numbers is None or changed is None or numbers.weight.shape != changed.weight.shape:
        return None
    size = float(numbers.weight.norm())
    return float((changed.weight - numbers.weight).norm()) / size if size else None
