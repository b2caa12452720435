"""What tests of other packages replace or read here, though no setting reaches it."""

from __future__ import annotations

from abliterator.files import _write


def copy_in_chunks(monkeypatch, n_bytes: int) -> None:
    """Sets the number of bytes that are copied or hashed at once."""
    monkeypatch.setattr(_write, "_CHUNK", n_bytes)
