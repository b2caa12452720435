"""A model's config: read, compared with the weights beside it, and the class that it asks for."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from abliterator.devices import enough_memory
from abliterator.errors import CheckpointError
from abliterator.model._foreign import as_sentence, foreign

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

# Vision models whose text half transformers' causal LM class does not find: only under its old
# names (mllama), or not at all (emu3).
_WHOLE = ("emu3", "mllama")

# Numbers that quantisers pack into one element at most: of 2 bits, in 64.
_PACKED = 32

# Formats, as `quant_method` names them, whose weights transformers leaves packed beside a GPU.
_DECODED = ("fp8", "mxfp4")


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Converts exceptions of transformers while it reads a model to named errors."""
    from safetensors import SafetensorError

    with foreign(
        f"transformers cannot load the model in {folder}",
        "Check that the folder holds a whole causal LM; if it needs its own code, set "
        "trust_remote_code and pin a revision in the recipe.",
    ):
        try:
            with _without_progress_bar(), enough_memory(f"The model in {folder}"):
                yield
        except SafetensorError as error:
            raise CheckpointError(
                f"A weight file in {folder} is damaged: {as_sentence(error)} Download the model "
                "again."
            ) from error


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Disables transformers' progress bar, since callers show progress themselves."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The config in `folder`, of which quantised weights are to be decoded as they are loaded.

    Raises:
        CheckpointError: for a config whose language model is not described by a config.
        Exception: whatever transformers raises for a config that it cannot read.
    """
    from transformers import AutoConfig, PreTrainedConfig

    config: PreTrainedConfig = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trust_remote_code
    )
    # transformers keeps any value of `text_config` for a type that has none
    if not isinstance(config.get_text_config(), PreTrainedConfig):
        raise CheckpointError(
            f"config.json in {folder} has a part for its language model that {config.model_type} "
            "does not have, such as `text_config`. Remove it, or download the model again."
        )
    ask_for_plain_numbers(config)
    return config


def require_weights_enough(config: PreTrainedConfig, folder: Path) -> None:
    """Raises CheckpointError where the config describes a larger model than the weights.

    transformers allocates all that config.json describes before it compares shapes.
    """
    from safetensors import SafetensorError, safe_open

    tensors = elements = 0
    unreadable = None  # of which the model may have no need
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt") as stored:
                for name in stored.offset_keys():
                    tensors += 1
                    elements += math.prod(stored.get_slice(name).get_shape())
        except SafetensorError as error:
            unreadable = error
    if getattr(config, "quantization_config", None):
        elements *= _PACKED
    n_hidden_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    layers = n_hidden_layers if type(n_hidden_layers) is int else 0
    described = 0
    if layers <= tensors:
        with torch.device("meta"):
            shapes = factory(config).from_config(copy.deepcopy(config)).parameters()
        described = sum(parameter.numel() for parameter in shapes)
    if layers > tensors or described > 2 * elements:  # a tied head may be counted twice
        if unreadable is not None:
            raise unreadable
        size = f"{described:,} parameters" if described else f"{layers:,} layers"
        raise CheckpointError(
            f"config.json in {folder} describes a model of {size}, and its weights are "
            f"{tensors:,} tensors of {elements:,} numbers. Use a checkpoint whose config and "
            "weights belong together."
        )


def ask_for_plain_numbers(config: PreTrainedConfig) -> None:
    """Makes transformers dequantize block-wise FP8 and MXFP4 on loading, on every machine.

    Without an accelerator it does so anyway. Where it sees one, whatever the model's device, it
    leaves the weights packed and fetches code for the GPU from the Hub to multiply them (package
    `kernels`): there would be no gradients through it, and the same recipe would measure another
    model than on the next machine.

    Args:
        config: of the model; changed in place where it says one of these formats.
    """
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method") in _DECODED:
        config.quantization_config = {**settings, "dequantize": True}


def factory(config: PreTrainedConfig) -> type[_BaseAutoModelClass]:
    """The class that loads the model: causal LMs as such, else text and images to text."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and config.model_type not in _WHOLE
    reads_images = not causal and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    factory: type[_BaseAutoModelClass] = AutoModelForCausalLM
    return AutoModelForImageTextToText if reads_images else factory
