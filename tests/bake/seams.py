"""What tests of other packages replace here, though no setting reaches it."""

from __future__ import annotations

from abliterator.bake import _write


def bake_in_threads(count: int) -> None:
    """From here on, checkpoints of any size are baked by so many threads; for a child process."""
    _write.bake_workers = lambda *_: count  # type: ignore[assignment]
