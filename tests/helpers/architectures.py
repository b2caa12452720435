"""Tiny random models of every model_type in the anatomy's table that transformers builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from abliterator.subspace import orthonormal_basis
from tests.helpers.architecture_sizes import (
    AROUND,
    D_MODEL,
    OWN,
    SAVED_AS_LOADED,
    VARIANTS,
    VISION,
    VOCABULARY,
    WANTED,
    WRAPPED,
)
from tests.helpers.tiny import randomise

__all__ = [
    "D_MODEL",
    "SAVED_AS_LOADED",
    "VARIANTS",
    "VOCABULARY",
    "basis",
    "build",
    "image",
    "save",
    "tokens",
]


def basis() -> torch.Tensor:
    """Q [D_MODEL, 3], the same at every call."""
    return orthonormal_basis(torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(3)))


def tokens() -> torch.Tensor:
    """[3, 9] token ids, the same at every call."""
    return torch.randint(4, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(5))


def image(name: str, rows: int) -> dict[str, torch.Tensor]:
    """A further input for so many rows of tokens: an image, where blocks run only with one."""
    if name == "ernie4_5_vl_moe":  # every second token is an image's, which has experts of its own
        return {"moe_mm_token_type_ids": (torch.arange(9) % 2).expand(rows, 9)}
    if name != "mllama":
        return {}
    states = torch.randn(rows, 5, D_MODEL, generator=torch.Generator().manual_seed(7))
    return {"cross_attention_states": states}


def build(name: str, *, seed: int = 0) -> torch.nn.Module:
    """A random model of a model_type or of a variant, gains and biases random too."""
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    torch.manual_seed(seed)
    model_type, own = VARIANTS.get(name, (name, OWN.get(name, {})))
    config = _config(model_type, own)
    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    factory = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    model = factory.from_config(config).eval()
    randomise(model)
    return model


def save(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Saves `build(name)` without a tokenizer; `options` go to save_pretrained."""
    model = build(name)
    if name in SAVED_AS_LOADED:
        options = {"save_original_format": False, **options}
    if dtype != torch.float32:
        model.to(dtype)
    model.save_pretrained(folder, **options)
    return folder


def _config(model_type: str, own: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    blank = AutoConfig.for_model(model_type)
    if not _is_wrapper(blank):
        return _sized(type(blank), WANTED, own)
    parts = dict(AROUND.get(model_type, {}))
    for key in {*type(blank).sub_configs} - {*parts}:
        part = getattr(blank, key)
        if key == "text_config":
            text = {**OWN.get(part.model_type, {}), **WRAPPED.get(model_type, {}), **own}
            parts[key] = _sized(type(part), WANTED, text).to_dict()
        elif part is not None:
            parts[key] = _sized(type(part), VISION, {}).to_dict()
    return AutoConfig.for_model(model_type, **parts)


def _is_wrapper(config: Any) -> bool:
    return config.get_text_config() is not config


def _sized(config_class: Any, sizes: dict[str, Any], own: dict[str, Any]) -> Any:
    known = {*config_class().to_dict(), *config_class.attribute_map}
    wanted = {key: value for key, value in sizes.items() if key in known} | own
    return config_class(**{key: value for key, value in wanted.items() if value is not None})
