"""Notes on a model for its user before anything heavy runs, from its small files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterator.checkpoint import Checkpoint
from abliterator.errors import FileError
from abliterator.files import read_text
from abliterator.source import ModelSource


def notes_on(
    source: ModelSource, checkpoint: Checkpoint, card: Mapping[str, Any] | None
) -> tuple[str, ...]:
    """One note for each property that would stop a build later, or that a user may not expect.

    Args:
        source: where the model comes from.
        checkpoint: the model.
        card: front matter of its README.md; None where it cannot be read.
    """
    quantised = checkpoint.config.get("quantization_config")
    notes = {
        "The tokenizer has no chat template, without which prompts cannot be rendered and a build "
        "stops. Use the chat or instruct version of the model, or put a chat_template.jinja in its "
        "folder.": not _has_template(source.folder),
        "The model is gated on the Hub. What is made of it carries its terms: a publication asks "
        "for them again.": source.gated,
        "The front matter of the model's README.md cannot be read (no YAML, an alias in it, or "
        "nested too deeply), so its licence is not known from there; a publication needs "
        "`--license`.": card is None,
        "The weights are quantised. `edit.quantized` says whether they stay so; what rounding "
        "leaves of the directions is measured (`leak`), and a bfloat16 checkpoint leaves less.": (
            bool(quantised)
        ),
        "config.json names Python code of its own. Where transformers does not have the model, the "
        "recipe needs `trust_remote_code: true` and, from the Hub, a revision.": "auto_map"
        in checkpoint.config,
    }
    return tuple(note for note, applies in notes.items() if applies)


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        settings = json.loads(read_text(folder / "tokenizer_config.json"))
    except (FileError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))
