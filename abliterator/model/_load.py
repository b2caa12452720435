"""Loads a causal LM and its tokenizer, from local files only."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from abliterator.anatomy import require_countable
from abliterator.devices import (
    AUTO,
    BALANCED,
    choose_device,
    enough_memory,
    is_out_of_memory,
)
from abliterator.errors import CheckpointError, GenerationError, RecipeError
from abliterator.files import read_text, require_plain_folder, shown
from abliterator.model._config import factory, loading, read_config, require_weights_enough
from abliterator.model._decoded import from_weights, packed_weights
from abliterator.model._finite import require_first_pass
from abliterator.model._foreign import foreign
from abliterator.model._placement import (
    WeightLimit,
    device_map,
    main_device,
    offload_options,
    remove_with,
)
from abliterator.model._run import (
    RunBatches,
    copy_input_of_head,
    run_batches,
    stored_parameter,
)
from abliterator.model._tokenizer import load_tokenizer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The first text that every loaded model reads.
_FIRST_TEXT = "Name a planet, and say how far it is from the sun."

# How many times its stored size a model has in memory at most: 16-bit numbers in float32, and
# quantised ones of 4 bits.
_WIDENED, _DECODED_SIZE = 2, 8


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer.

    Attributes:
        model: the causal LM, without gradients.
        tokenizer: its tokenizer; padding is never left to it.
        folder: where both were loaded from.
        device: where its inputs go; the device of all weights, unless they lie on several.
        placement: device of every module by path, where the weights lie on several.
        run_batches: runs batches of prompts, one after the other or in another order.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    device: str
    placement: Mapping[str, str] = field(default_factory=dict)
    run_batches: RunBatches = run_batches


def load_model(
    folder: Path,
    *,
    device: str,
    dtype: str | None,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Loads the causal LM and the tokenizer in `folder`, from local files only.

    Args:
        folder: a checkpoint in safetensors format.
        device: as torch names it ("cpu", "cuda", "cuda:1", "mps", "xpu"); "auto", which is the
            first accelerator if the model fits there, else all accelerators, host memory and disk
            in this order; or "balanced", all accelerators evenly.
        dtype: "float32", "bfloat16" or "float16"; None is the dtype that config.json says.
        max_memory: bytes of weights on each accelerator and in host memory at most, where the
            model is spread; None is a share of what is free.
        trust_remote_code: whether Python files in `folder` may run.

    Raises:
        CheckpointError: if weights are missing, or there is no tokenizer.
        FileError: if something in the folder is no plain file.
        GenerationError: if transformers cannot load or run it, or the device cannot hold it.
    """
    in_dtype = require_dtype(dtype)
    require_plain_folder(folder)
    with loading(folder):
        require_countable(json.loads(read_text(folder / "config.json")))
    limit = WeightLimit(device, max_memory)
    model, placement = _load_weights(folder, limit, in_dtype, trust_remote_code)
    device = main_device(placement)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    problem = f"The model in {folder} cannot be put on device {device!r}"
    with (
        foreign(problem, "Use a device that this machine has; `cpu` always works."),
        enough_memory(f"On device {device!r}, the model in {folder}"),
    ):
        if len(placement) == 1:
            model = model.to(device)
        model = model.eval().requires_grad_(False)
    if trust_remote_code:
        _require_stored_weights(model, folder)
        _accept_cache(model)
    require_stop_tokens(model, tokenizer, folder)
    copy_input_of_head(model)
    loaded = LoadedModel(model, tokenizer, folder, device, placement)
    _require_that_it_runs(loaded, trust_remote_code)
    return loaded


def require_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a name.

    Raises:
        RecipeError: for a name that is none of "float32", "bfloat16" and "float16".
    """
    if name is not None and name not in _DTYPES:
        raise RecipeError(f"dtype is {name!r}, expected one of {', '.join(_DTYPES)}.")
    return _DTYPES[name] if name else None


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
    folder: Path, limit: WeightLimit, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, str]]:
    """The model with its weights, and the device of every module."""
    # Attention is left to transformers' default (sdpa where the model has it): remote code may have
    # eager only.
    with loading(folder):
        config = read_config(folder, trust_remote_code)
        if not trust_remote_code:
            require_weights_enough(config, folder)
        placement = _placement(config, folder, limit, dtype, trust_remote_code)
        options, offloaded = offload_options(placement)
        weights = packed_weights(folder)
        if weights is not None:
            model, report = from_weights(folder, config, weights, dtype, options)
        else:
            model, report = factory(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
            )
        remove_with(model, offloaded)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"The weights in {folder} lack {len(missing)} tensors that the model needs, such as "
            f"{missing[0]}: they would be random numbers. Download the model again."
        )
    return model, placement


def placement_of(
    folder: Path,
    *,
    device: str,
    dtype: str | None,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """The device of every module with which `load_model` would load the model in `folder`.

    Args and errors are those of `load_model`; no weights are read.

    Returns:
        Module path to device: one entry, with the path "", where all weights lie on one device.
    """
    with loading(folder):
        config = read_config(folder, trust_remote_code)
        limit = WeightLimit(device, max_memory)
        return _placement(
            config, folder, limit, _DTYPES[dtype] if dtype else None, trust_remote_code
        )


def _placement(
    config: PreTrainedConfig,
    folder: Path,
    limit: WeightLimit,
    dtype: torch.dtype | None,
    own_code: bool,
) -> dict[str, str]:
    """The device of every module of the model in `folder`."""
    if limit.device not in (AUTO, BALANCED):
        return {"": choose_device(limit.device)}
    growth = _DECODED_SIZE if getattr(config, "quantization_config", None) else _WIDENED
    stored = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    # most models need no look at their shapes, which old remote code may not be able to build
    if limit.device == AUTO and limit.holds(growth * stored):
        return {"": choose_device(AUTO)}
    with torch.device("meta"):
        shapes = factory(config).from_config(copy.deepcopy(config), trust_remote_code=own_code)
    return device_map(shapes, limit, dtype or config.dtype or torch.float32)


def _require_stored_weights(model: PreTrainedModel, folder: Path) -> None:
    """Raises GenerationError where a model's own code overwrote loaded weights.

    Initialisers older than transformers 5 do: Qwen 1's draws attn.c_proj anew.
    """
    from safetensors import safe_open

    parameters = {name for name, _ in model.named_parameters()}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in parameters.intersection(stored.keys()):
                module, _, parameter = name.rpartition(".")
                value = stored_parameter(model.get_submodule(module), parameter).cpu()
                if not torch.equal(value, stored.get_tensor(name).to(value.dtype)):
                    raise GenerationError(
                        f"The model's own Python code changed {name} after it was loaded: it was "
                        "probably written for an older transformers. Use a conversion of the "
                        "model to an architecture that transformers has."
                    )


def require_stop_tokens(
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
            first = torch.tensor([ids], device=loaded.device)
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
