"""Loads a causal LM and its tokenizer, from local files only."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from abliterator.anatomy import require_countable
from abliterator.devices import enough_memory, is_out_of_memory
from abliterator.errors import CheckpointError, GenerationError, RecipeError
from abliterator.files import read_text, require_plain_folder, shown
from abliterator.model._finite import require_first_pass
from abliterator.model._foreign import as_sentence, foreign
from abliterator.model._tokenizer import load_tokenizer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The first text that every loaded model reads.
_FIRST_TEXT = "Name a planet, and say how far it is from the sun."

# Vision models whose text half transformers' causal LM class does not find: only under its old
# names (mllama), or not at all (emu3).
_WHOLE = ("emu3", "mllama")

# Numbers that quantisers pack into one element at most: of 2 bits, in 64.
_PACKED = 32

# Formats, as `quant_method` names them, whose weights transformers leaves packed beside a GPU.
_DECODED = ("fp8", "mxfp4")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer.

    Attributes:
        model: the causal LM, without gradients.
        tokenizer: its tokenizer; padding is never left to it.
        folder: where both were loaded from.
        device: where the weights are.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    device: str


def load_model(
    folder: Path, *, device: str, dtype: str | None, trust_remote_code: bool = False
) -> LoadedModel:
    """Loads the causal LM and the tokenizer in `folder`, from local files only.

    Args:
        folder: a checkpoint in safetensors format.
        device: as torch names it: "cpu", "cuda", "cuda:1", "mps", "xpu".
        dtype: "float32", "bfloat16" or "float16"; None is the dtype that config.json says.
        trust_remote_code: whether Python files in `folder` may run.

    Raises:
        CheckpointError: if weights are missing, or there is no tokenizer.
        FileError: if something in the folder is no plain file.
        GenerationError: if transformers cannot load or run it, or the device cannot hold it.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise RecipeError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}.")
    require_plain_folder(folder)
    with _loading(folder):
        require_countable(json.loads(read_text(folder / "config.json")))
    model = _load_weights(folder, _DTYPES[dtype] if dtype else "auto", trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    problem = f"The model in {folder} cannot be put on device {device!r}"
    with (
        foreign(problem, "Use a device that this machine has; `cpu` always works."),
        enough_memory(f"On device {device!r}, the model in {folder}"),
    ):
        model = model.to(device).eval().requires_grad_(False)
    if trust_remote_code:
        _require_stored_weights(model, folder)
        _accept_cache(model)
    _require_stop_tokens(model, tokenizer, folder)
    loaded = LoadedModel(model, tokenizer, folder, device)
    _require_that_it_runs(loaded, trust_remote_code)
    return loaded


def _accept_cache(model: PreTrainedModel) -> None:
    """Renames the argument `cache` for a model's own code that names it `past_key_values`.

    transformers' `generate` passes keys and values as `cache` from 5.24 on. Older code that accepts
    any keyword argument would ignore them silently.
    """
    parameters = inspect.signature(model.forward).parameters
    if "past_key_values" not in parameters or "cache" in parameters:
        return

    def renamed(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "cache" in kwargs:
            kwargs = {**kwargs, "past_key_values": kwargs["cache"]}
            del kwargs["cache"]
        return args, kwargs

    model.register_forward_pre_hook(renamed, with_kwargs=True)


def _load_weights(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool
) -> PreTrainedModel:
    # Attention is left to transformers' default (sdpa where the model has it): remote code may have
    # eager only.
    with _without_progress_bar(), _loading(folder):
        config = read_config(folder, trust_remote_code)
        if not trust_remote_code:
            _require_weights_enough(config, folder)
        model, report = _factory(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"The weights in {folder} lack {len(missing)} tensors that the model needs, such as "
            f"{missing[0]}: they would be random numbers. Download the model again."
        )
    loaded: PreTrainedModel = model
    return loaded


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Converts exceptions of transformers while it reads a model to named errors."""
    from safetensors import SafetensorError

    with foreign(
        f"transformers cannot load the model in {folder}",
        "Check that the folder holds a whole causal LM; if it needs its own code, set "
        "trust_remote_code and pin a revision in the recipe.",
    ):
        try:
            with enough_memory(f"The model in {folder}"):
                yield
        except SafetensorError as error:
            raise CheckpointError(
                f"A weight file in {folder} is damaged: {as_sentence(error)} Download the model "
                "again."
            ) from error


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


def _require_weights_enough(config: PreTrainedConfig, folder: Path) -> None:
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
            shapes = _factory(config).from_config(copy.deepcopy(config)).parameters()
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


def _factory(config: PreTrainedConfig) -> type[_BaseAutoModelClass]:
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


def _require_stored_weights(model: PreTrainedModel, folder: Path) -> None:
    """Raises GenerationError where a model's own code overwrote loaded weights.

    Initialisers older than transformers 5 do: Qwen 1's draws attn.c_proj anew.
    """
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys() & parameters.keys():
                value = parameters[name].cpu()
                if not torch.equal(value, stored.get_tensor(name).to(value.dtype)):
                    raise GenerationError(
                        f"The model's own Python code changed {name} after it was loaded: it was "
                        "probably written for an older transformers. Use a conversion of the "
                        "model to an architecture that transformers has."
                    )


def _require_stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Checks that every `eos_token_id` is a token id, before anything is measured."""
    config = model.config
    for where, part in (
        ("generation_config.json", model.generation_config),
        ("config.json", config),
        ("config.json", config.get_text_config()),
        ("tokenizer_config.json", tokenizer),
    ):
        value = getattr(part, "eos_token_id", None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise GenerationError(
                f"{folder / where} says eos_token_id: {shown(value)}, expected the id of a token "
                "that ends an answer, or a list of such. Correct it, or download the model again."
            )


def _require_that_it_runs(loaded: LoadedModel, trust_remote_code: bool) -> None:
    """Raises GenerationError for a model that loads but cannot run, or has logits not finite.

    Its shapes may disagree with its config, or its own code with this transformers, and a long run
    would fail late. Lack of memory is not reported here: later passes do so, with advice.
    """
    import transformers

    from abliterator.model._limits import limits_of  # which needs LoadedModel

    code = "Its own Python code was probably written for an older version: use" * trust_remote_code
    limits = limits_of(loaded)
    ids = list(loaded.tokenizer(_FIRST_TEXT)["input_ids"])[: limits.context]
    # tokens without an embedding are reported when prompts are rendered
    ids = [token for token in ids if limits.vocabulary is None or token < limits.vocabulary] or [0]
    with foreign(
        f"The model in {loaded.folder} does not run with transformers {transformers.__version__}",
        f"{code or 'Check its config.json, or use'} a conversion of the model to an architecture "
        "that transformers has.",
    ):
        try:
            first = torch.tensor([ids], device=loaded.model.device)
            require_first_pass(loaded, first)
            _generate_two(loaded.model, first[:, :2])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise


def _generate_two(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Generates two tokens, so that a failure of `generate` shows when the model is loaded."""
    from transformers import GenerationConfig

    original_config = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=2, pad_token_id=0)
    with torch.inference_mode():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    model.generation_config = original_config
