"""What tests of other packages replace or read here, though no setting reaches it."""

from __future__ import annotations

from abliterator.server import _http

CLIENT = _http
"""The client of model servers, with `_reply` and `_format`."""


def shorten_waits(monkeypatch, first: float = 0.01, longest: float = 0.05) -> None:
    """Limits the waits of the client of model servers, in seconds."""
    monkeypatch.setattr(_http, "WAIT", (first, longest))
