"""Nobody waits long here."""

from __future__ import annotations

import pytest

from tests.server.seams import shorten_waits


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch):
    shorten_waits(monkeypatch)
