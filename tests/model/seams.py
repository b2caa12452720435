"""What tests of other packages replace or read here, though no setting reaches it."""

from __future__ import annotations

from abliterator.model import _prefix


def share_prefixes_from(monkeypatch, tokens: int) -> None:
    """Sets the length from which on a common prefix of prompts runs once."""
    monkeypatch.setattr(_prefix, "WORTH_SHARING", tokens)
