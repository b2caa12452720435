"""Copies of a checkpoint of which one file beside the weights was changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Change = Callable[[Path], Any]


def rewrite(name: str, change: Callable[[dict], Any]) -> Change:
    """Changes a JSON file of a folder in place."""

    def apply(folder: Path) -> None:
        path = folder / name
        plain = json.loads(path.read_text("utf-8")) if path.exists() else {}
        change(plain)
        path.write_text(json.dumps(plain), encoding="utf-8")

    return apply


def replace_text(name: str, old: str, new: str) -> Change:
    def apply(folder: Path) -> None:
        text = (folder / name).read_text("utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")

    return apply


def other_template(text: str) -> Change:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def shuffle_vocabulary(plain: dict) -> None:
    """Two ordinary tokens change places, again and again."""
    vocabulary = plain["model"]["vocab"]
    added = {token["content"] for token in plain["added_tokens"]}
    names = [name for name in vocabulary if name not in added]
    ids = [vocabulary[name] for name in names]
    vocabulary.update(zip(names, ids[1:] + ids[:1], strict=True))


def add_token(plain: dict) -> None:
    plain["added_tokens"].append(
        {**plain["added_tokens"][-1], "id": len(plain["model"]["vocab"]), "content": "<|new|>"}
    )


def copied(base: Path, where: Path, change: Change) -> Path:
    shutil.copytree(base, where)
    change(where)
    return where
