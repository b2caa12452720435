"""Weights and tokenizer, from local files only."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from abliterator.errors import CheckpointError, GenerationError, RecipeError
from abliterator.model._chat import one_line
from abliterator.model._finite import require_first_pass
from abliterator.model._run import is_out_of_memory

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What remote code raises when it meets a transformers that it was not written for.
_REMOTE_CODE_ERRORS = (AttributeError, ImportError, RuntimeError, TypeError, ValueError)
UNLOADABLE = (*_REMOTE_CODE_ERRORS, OSError, KeyError)

# The first text that every loaded model reads.
_FIRST_TEXT = "Name a planet, and say how far it is from the sun."

# Models that see, of which transformers' causal LM does not find the text half: under its old names
# only (mllama), or under none (emu3).
_WHOLE = ("emu3", "mllama")

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
        device: as torch names it: "cpu", "cuda", "cuda:1", "mps".
        dtype: "float32", "bfloat16" or "float16"; None is the dtype that config.json says.
        trust_remote_code: whether Python files in `folder` may run.

    Raises:
        CheckpointError: if weights are missing, or there is no tokenizer.
        GenerationError: if transformers cannot load it, or the device cannot hold it.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise RecipeError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}.")
    model = _load_weights(folder, _DTYPES[dtype] if dtype else "auto", trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    try:
        model = model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        raise GenerationError(
            f"The model in {folder} cannot be put on device {device!r}: {one_line(error)} Use a "
            "device that this machine has and that can hold the model; `cpu` always works."
        ) from error
    if trust_remote_code:
        _require_stored_weights(model, folder)
        _accept_cache(model)
    loaded = LoadedModel(model, tokenizer, folder, device)
    _require_that_it_runs(loaded)
    return loaded


def _accept_cache(model: PreTrainedModel) -> None:
    """Lets code of a model's own be called as transformers' `generate` calls a model.

    From 5.24 on that hands over keys and values as `cache`. Older code says `past_key_values`, and
    where it takes any further argument too, it would ignore them without a word.
    """
    taken = inspect.signature(model.forward).parameters
    if "past_key_values" not in taken or "cache" in taken:
        return

    def renamed(
        _module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "cache" in given:
            given = {**given, "past_key_values": given["cache"]}
            del given["cache"]
        return args, given

    model.register_forward_pre_hook(renamed, with_kwargs=True)


def _load_weights(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool
) -> PreTrainedModel:
    from safetensors import SafetensorError

    try:
        # Attention is left to transformers' default (sdpa where the model has it): remote code may
        # have eager only.
        with _no_bar():
            config = read_config(folder, trust_remote_code)
            model, report = _factory(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise CheckpointError(
            f"A weight file in {folder} is damaged: {one_line(error)} Download the model again."
        ) from error
    except UNLOADABLE as error:
        raise GenerationError(
            f"transformers cannot load the model in {folder}: {one_line(error)} Check that the "
            "folder holds a whole causal LM; if it needs its own code, set trust_remote_code and "
            "pin a revision in the recipe."
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"The weights in {folder} lack {len(missing)} tensors that the model needs, such as "
            f"{missing[0]}: they would be random numbers. Download the model again."
        )
    loaded: PreTrainedModel = model
    return loaded


def read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The config in `folder`, of which quantised weights are to be decoded as they are loaded."""
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trust_remote_code
    )
    ask_for_plain_numbers(config)
    return config


def ask_for_plain_numbers(config: PreTrainedConfig) -> None:
    """Has transformers decode block-wise FP8 and MXFP4 as it loads, on every machine alike.

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
def _no_bar() -> Iterator[None]:
    """Keeps transformers' own bar off the terminal: whoever loads a model shows progress."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _require_stored_weights(model: PreTrainedModel, folder: Path) -> None:
    """Stops at a model whose own code overwrote what was loaded.

    Initialisers older than transformers 5 do: Qwen 1's gives attn.c_proj new random numbers.
    """
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys() & parameters.keys():
                found = parameters[name].cpu()
                if not torch.equal(found, stored.get_tensor(name).to(found.dtype)):
                    raise GenerationError(
                        f"The model's own Python code changed {name} after it was loaded: it was "
                        "probably written for an older transformers. Use a conversion of the "
                        "model to an architecture that transformers has."
                    )


def _require_that_it_runs(loaded: LoadedModel) -> None:
    """Stops at a model whose code fails, or whose logits are no numbers, before hours of work."""
    import transformers

    from abliterator.model._limits import limits_of  # which needs LoadedModel

    limits = limits_of(loaded)
    ids = list(loaded.tokenizer(_FIRST_TEXT)["input_ids"])[: limits.context]
    # which of the prompts' tokens it has is for whoever renders prompts to say
    ids = [token for token in ids if limits.vocabulary is None or token < limits.vocabulary] or [0]
    try:
        require_first_pass(loaded, torch.tensor([ids], device=loaded.model.device))
    except _REMOTE_CODE_ERRORS as error:
        if is_out_of_memory(error):
            return  # what needs more memory than that says so with advice
        if type(loaded.model).__module__.startswith("transformers."):
            code, advice = "code", "Check its config.json, or download the model again."
        else:
            code = "own Python code"
            advice = (
                "It was probably written for an older version. Use a conversion of the model to an "
                "architecture that transformers has."
            )
        raise GenerationError(
            f"The model's {code} does not run with transformers {transformers.__version__}: "
            f"{one_line(error)} {advice}"
        ) from error


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder, without the model.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        empty = not len(tokenizer)
    except (*_REMOTE_CODE_ERRORS, OSError, KeyError) as error:
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be loaded: {one_line(error)} Download the "
            "tokenizer files of the model (tokenizer.json, tokenizer_config.json) into the "
            "folder."
        ) from error
    if empty:
        raise CheckpointError(
            f"The folder {folder} has no tokenizer. Download the tokenizer files of the model "
            f"(tokenizer.json, tokenizer_config.json) into it."
        )
    return tokenizer
