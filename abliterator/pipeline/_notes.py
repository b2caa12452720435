"""What a user should know of a model before anything heavy runs, told from small files alone."""

from __future__ import annotations

import json
from pathlib import Path

from abliterator.checkpoint import Checkpoint
from abliterator.source import ModelSource


def notes_on(source: ModelSource, checkpoint: Checkpoint) -> tuple[str, ...]:
    """One sentence or two for each thing that would stop a build later, or surprise its user."""
    quantised = checkpoint.config.get("quantization_config")
    notes = {
        "The tokenizer has no chat template, without which prompts cannot be rendered and a build "
        "stops. Use the chat or instruct version of the model, or put a chat_template.jinja in its "
        "folder.": not _has_template(source.folder),
        "The model is gated on the Hub. What is made of it carries its terms: a publication asks "
        "for them again.": source.gated,
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
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))
