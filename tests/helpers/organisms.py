"""The small trained models under tests/models, as folders that load by themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "recipes" / "demo"
TOKENIZER = ROOT / "abliterator" / "data" / "demo" / "model"


def organism(name: str, folder: Path) -> Path:
    """Writes tests/models/NAME to a new folder in float32, with the demo's tokenizer.

    Stored in float32, so that hooks and weights can be held against each other without what storing
    in bfloat16 changes.
    """
    shutil.copytree(ROOT / "tests" / "models" / name, folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / file, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    weights = {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompts(name: str) -> list[str]:
    """The prompts of recipes/demo/NAME.jsonl."""
    return [json.loads(s)["prompt"] for s in (PROMPTS / f"{name}.jsonl").read_text().splitlines()]
