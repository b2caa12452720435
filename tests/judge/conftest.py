"""Nobody waits long here."""

from __future__ import annotations

import pytest

from abliterator.server import _http as server_module


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch):
    monkeypatch.setattr(server_module, "WAIT", (0.01, 0.05))
