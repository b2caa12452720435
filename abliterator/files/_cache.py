"""Where files that several runs share are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of caches shared by runs: $ABLITERATOR_CACHE, else in the user's cache folder."""
    if folder := os.environ.get("ABLITERATOR_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "abliterator"
