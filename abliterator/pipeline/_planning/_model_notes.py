"""Notes on a model for its user before anything heavy runs, from its small files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterator.anatomy import Anatomy
from abliterator.checkpoint import Checkpoint
from abliterator.errors import FileError
from abliterator.files import package_yaml, read_text
from abliterator.source import ModelSource


def notes_on(
    source: ModelSource,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    card: Mapping[str, Any] | None,
) -> tuple[str, ...]:
    """One note for each property that would stop a build later, or that a user may not expect.

    Args:
        source: where the model comes from.
        checkpoint: the model.
        anatomy: of its architecture.
        card: front matter of its README.md; None where it cannot be read.
    """
    properties = {
        "no_chat_template": not _has_template(source.folder),
        "gated": source.gated,
        "unreadable_card": card is None,
        "quantised": bool(checkpoint.config.get("quantization_config")),
        "own_code": "auto_map" in checkpoint.config,
        "several_streams": bool(anatomy.sublayers) and not anatomy.partial,
    }
    texts = package_yaml("abliterator.pipeline._planning", "notes.yaml")
    return tuple(texts[name] for name, applies in properties.items() if applies)


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        settings = json.loads(read_text(folder / "tokenizer_config.json"))
    except (FileError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))
