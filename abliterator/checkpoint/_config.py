"""config.json of an edited checkpoint and adapter_config.json of an adapter.

Each has one allowed text, so that a verification can compute it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from abliterator.checkpoint._folder import read_json
from abliterator.files import damaged

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_METADATA = {"format": "pt"}
"""Metadata in the header of ADAPTER_WEIGHTS."""

CONFIG_ENTRY = "abliterator"
"""Key under which config.json says who edited the weights; loaders keep it and do not read it."""

QUANTISER_FILE = "hf_quant_config.json"
"""Where ModelOpt says a second time what is quantised."""

# Keys that would be false of the edited model: save_pretrained writes where the base came from.
_FALSE_NOW = {"_name_or_path", CONFIG_ENTRY}


def edited_config(
    base: Mapping[str, Any],
    made_by: Mapping[str, str],
    *,
    changed: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The text of config.json of an edited checkpoint.

    All keys of the base stand in their order, `_name_or_path` left out; the last one is
    `abliterator`.

    Args:
        base: the base's config.json, parsed.
        made_by: value of the key `abliterator`.
        changed: new values of further keys that the edit changes; None leaves the key out.
    """
    removed = _FALSE_NOW.union(key for key, value in changed.items() if value is None)
    values = {key: changed.get(key, value) for key, value in base.items() if key not in removed}
    return json.dumps({**values, CONFIG_ENTRY: dict(made_by)}, indent=2) + "\n"


def edited_quantiser_config(folder: Path, modules: Sequence[str]) -> str | None:
    """The text of QUANTISER_FILE when some modules are no longer quantised; None for no change.

    Args:
        folder: of the base.
        modules: as `exclude_modules` lists them.

    Raises:
        CheckpointError: the file is no JSON, or holds no list there.
    """
    path = folder / QUANTISER_FILE
    if not modules or not path.is_file():
        return None
    config = read_json(path)
    quantization = config.get("quantization", {})
    listed = quantization.get("exclude_modules") or [] if isinstance(quantization, dict) else None
    if not isinstance(listed, list):
        raise damaged(path, "its list of modules that are not quantised is no list")
    added = [module for module in modules if module not in listed]
    quantization = {**quantization, "exclude_modules": [*listed, *added]}
    return json.dumps({**config, "quantization": quantization}, indent=4) + "\n"


def adapter_config(
    base_model: str, revision: str | None, *, modules: Iterable[str], rank: int
) -> str:
    """The text of adapter_config.json: a LoRA of scale 1 for PEFT.

    Args:
        base_model: Hub id or name of the base.
        revision: commit of the base.
        modules: run-time paths of the modules whose weights are edited.
        rank: k.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,  # PEFT multiplies by lora_alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    return json.dumps(config, indent=1) + "\n"


def adapter_tensors(module: str) -> tuple[str, str]:
    """Names, in ADAPTER_WEIGHTS, of A [k, in] and B [out, k] of one module: it gains B A."""
    prefix = f"base_model.model.{module}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
