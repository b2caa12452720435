"""The front matter of a checkpoint's README.md, as plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterator.checkpoint._header import encodable
from abliterator.errors import FileError
from abliterator.files import read_text

CARD_FILE = "README.md"

# Public cards with long tables of results have 1 MB.
_MAX_BYTES = 16 << 20
_MAX_DEPTH = 32
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def card_metadata(folder: Path) -> dict[str, Any] | None:
    """The front matter of the folder's README.md: {} where there is none, None if unreadable.

    Only JSON's values are kept: dates, bytes, and text that is not Unicode are left out. Unreadable
    is what is no YAML, uses aliases (a few lines of which make gigabytes), or is nested more than
    32 levels deep.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        front = _FRONT_MATTER.match(read_text(path, max_bytes=_MAX_BYTES))
    except FileError:
        return None
    if front is None:
        return {}
    values = _parsed(front[1])
    metadata = _plain(values) if isinstance(values, dict) else None
    return metadata if isinstance(metadata, dict) else None


def declared_base_models(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Ids of the models that a card's front matter names as `base_model`."""
    names = metadata.get("base_model")
    names = names if isinstance(names, list) else [names]
    return tuple(name for name in names if isinstance(name, str))


def _parsed(text: str) -> Any:
    """The parsed value of a YAML text; None if it is empty, unreadable or too deep."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        for token in yaml.scan(text, Loader=loader):
            if isinstance(token, yaml.AliasToken):
                return None
            name = type(token).__name__
            depth += name.endswith("StartToken") - name.endswith("EndToken")
            if depth > _MAX_DEPTH:
                return None
        return yaml.load(text, Loader=loader)
    except Exception:  # noqa: BLE001 - PyYAML raises many types for malformed text
        return None


_NOTHING = object()


def _plain(value: Any) -> Any:
    """The value with JSON's types only; `_NOTHING` if nothing is left."""
    if isinstance(value, dict):
        texts = (key for key in value if isinstance(key, str) and encodable(key))
        return {key: inner for key in texts if (inner := _plain(value[key])) is not _NOTHING}
    if isinstance(value, list):
        return [inner for item in value if (inner := _plain(item)) is not _NOTHING]
    if isinstance(value, float):
        return value if math.isfinite(value) else _NOTHING
    if isinstance(value, str):
        return value if encodable(value) else _NOTHING
    return value if value is None or isinstance(value, (bool, int)) else _NOTHING
