"""A causal LM whose weights stay in their files: for engines that read a part of them at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from abliterator.anatomy import require_countable
from abliterator.devices import choose_device
from abliterator.errors import UnsupportedModel
from abliterator.files import read_text, require_plain_folder
from abliterator.model._config import factory, loading, read_config, require_weights_enough
from abliterator.model._load import LoadedModel, require_dtype, require_stop_tokens
from abliterator.model._run import copy_input_of_head
from abliterator.model._tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


# Types whose weights in memory are not those in the files, by config.model_type.
_CHANGED_AFTER_LOADING = {
    "youtu": "transformers sets the embedding of its padding token to 0 when it loads the model",
}


def load_without_weights(
    folder: Path, *, device: str, dtype: str | None, trust_remote_code: bool = False
) -> LoadedModel:
    """A model in evaluation mode whose parameters have shapes and dtypes, but no numbers.

    Buffers that no file holds (rotary frequencies, masks) are there. Parameters are on torch's
    meta device until someone puts weights in their place.

    Args:
        folder: a checkpoint in safetensors format.
        device: where its inputs go; "auto" is the first accelerator, or the CPU.
        dtype: "float32", "bfloat16" or "float16"; None is the dtype that config.json says.
        trust_remote_code: whether the config may be read with Python files in `folder`.

    Raises:
        UnsupportedModel: for a model with its own code, one whose weights are stored quantised,
            one without a dtype, and types that transformers changes when it loads them: to load
            these means more than to read tensors.
        AbliteratorError: as `load_model`.
    """
    compute_dtype = require_dtype(dtype)
    require_plain_folder(folder)
    with loading(folder):
        require_countable(json.loads(read_text(folder / "config.json")))
        config = read_config(folder, trust_remote_code)
        compute_dtype = compute_dtype or config.dtype
        _require_plain_weights(config, folder, compute_dtype)
        require_weights_enough(config, folder)
        model = _empty(config, folder, compute_dtype)
    device = choose_device(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    require_stop_tokens(model, tokenizer, folder)
    copy_input_of_head(model)
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, folder, device)


def _require_plain_weights(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype | None
) -> None:
    reason = None
    if not type(config).__module__.startswith("transformers."):
        reason = "it has its own Python code"
    elif getattr(config, "quantization_config", None):
        reason = "its weights are stored quantised"
    elif dtype is None:
        reason = "its config.json names no dtype"
    else:
        reason = _CHANGED_AFTER_LOADING.get(config.get_text_config().model_type)
    if reason is not None:
        raise UnsupportedModel(
            f"The weights of the model in {folder} cannot be read block by block: {reason}. Load "
            "it whole, or on several devices and disk (`--device auto`)."
        )


def _empty(config: PreTrainedConfig, folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model as its code builds it, parameters on the meta device, buffers on the CPU."""
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = factory(config).from_config(config, dtype=dtype)
    # again, as when weights are loaded: at first buffers were computed in `dtype`
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    model.initialize_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model
