"""Constants and functions of the package that tests replace, though they are not public.

No setting reaches them, so tests of other packages replace them here: one import of each.
"""

from __future__ import annotations

from abliterator.engines import _logits
from abliterator.files import _write
from abliterator.model import _prefix
from abliterator.server import _http

CLIENT = _http
"""The client of model servers, with `_reply` and `_format`."""


def shorten_waits(monkeypatch, first: float = 0.01, longest: float = 0.05) -> None:
    """Limits the waits of the client of model servers, in seconds."""
    monkeypatch.setattr(_http, "WAIT", (first, longest))


def share_prefixes_from(monkeypatch, tokens: int) -> None:
    """Sets the length from which on a common prefix of prompts runs once."""
    monkeypatch.setattr(_prefix, "WORTH_SHARING", tokens)


def limit_logit_batches(monkeypatch, n_bytes: int) -> None:
    """Sets the size of one batch of logits."""
    monkeypatch.setattr(_logits, "BATCH_BYTES", n_bytes)


def copy_in_chunks(monkeypatch, n_bytes: int) -> None:
    """Sets the number of bytes that are copied or hashed at once."""
    monkeypatch.setattr(_write, "_CHUNK", n_bytes)
