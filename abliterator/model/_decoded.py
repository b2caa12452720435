"""Weights of packed numbers, decoded as a model is loaded.

transformers reads them with libraries of their own, most for GPUs alone, and some (ModelOpt's
NVFP4) not at all. Here they are the numbers that an edit sees, on every machine.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from abliterator.errors import GenerationError
from abliterator.files import read_text
from abliterator.formats import Layout, PackedLayout, storage_of
from abliterator.model._config import factory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class _Header(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    file: Path


class Weight:
    """A weight that is read when it is sliced, as safetensors' own slices are."""

    def __init__(self, name: str, headers: Mapping[str, _Header], layout: Layout | None) -> None:
        self._name, self._headers, self._layout = name, headers, layout

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self._layout is None:
            return self._tensor(self._name)[index]
        out = bytearray(2 * torch.Size(self._layout.dense.shape).numel())
        scales = self._layout.scales_from(self._bytes)
        self._layout.dequantize(bytearray(self._bytes(self._name)), scales, out)
        stored = torch.frombuffer(out, dtype=torch.bfloat16)
        return stored.view(self._layout.dense.shape)[index]

    def get_shape(self) -> list[int]:
        """Shape of the plain weight, as a slice of safetensors says it."""
        layout, header = self._layout, self._headers[self._name]
        return list(header.shape if layout is None else layout.dense.shape)

    def get_dtype(self) -> str:
        """Its dtype, by safetensors' name."""
        layout, header = self._layout, self._headers[self._name]
        return header.dtype if layout is None else layout.dense.dtype

    def _tensor(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._headers[name].file, "pt") as stored:
            tensor: torch.Tensor = stored.get_tensor(name)
        return tensor

    def _bytes(self, name: str) -> bytes:
        data: bytes = self._tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
        return data


def is_packed(folder: Path) -> bool:
    """Whether weights of the checkpoint in `folder` are packed, so that `load_model` decodes them.

    Raises:
        UnsupportedModel: as `packed_weights` does.
    """
    return packed_weights(folder) is not None


def packed_weights(folder: Path) -> dict[str, Weight] | None:
    """All weights of a checkpoint by their plain names; None where no numbers are packed.

    Raises:
        UnsupportedModel: for weights whose parts do not fit, or in a form that is not read.
    """
    config = json.loads(read_text(folder / "config.json"))
    if "quantization_config" not in config:
        return None
    storage = storage_of(config)
    headers = _headers(folder)
    layouts = {name: storage.quantized_layout(name, headers) for name in headers}
    if not any(isinstance(layout, PackedLayout) for layout in layouts.values()):
        return None
    weights = {*headers, *(layout.dense.name for layout in layouts.values() if layout is not None)}

    def is_part(name: str) -> bool:  # a tensor may have the name of a scale, and be none
        owner = storage.owner(name)
        return owner != name and owner in weights

    return {
        name if layout is None else layout.dense.name: Weight(name, headers, layout)
        for name, layout in layouts.items()
        if layout is not None or not is_part(name)
    }


def from_weights(
    folder: Path,
    config: PreTrainedConfig,
    weights: dict[str, Weight],
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a config with given weights, and transformers' report on missing ones.

    Args:
        folder: where its generation config is.
        config: of the model.
        weights: from `packed_weights`.
        dtype: of its weights; None is the config's.
        options: the placement, for `from_pretrained`.

    Raises:
        GenerationError: where weights would lie on disk.
    """
    from transformers import GenerationConfig

    if options.get("offload_folder"):
        raise GenerationError(
            f"The model in {folder} has packed weights, which are decoded to 16 bits in memory; "
            "they do not fit, and decoded weights are not kept on disk. Use a machine with more "
            "memory, or the model that it was made from."
        )
    plain = copy.deepcopy(config)
    del plain.quantization_config
    with torch.device("meta"):
        model_class = type(factory(plain).from_config(copy.deepcopy(plain)))
    model, report = model_class.from_pretrained(
        None,
        config=plain,
        state_dict=weights,
        dtype=dtype or config.dtype or torch.bfloat16,
        output_loading_info=True,
        **options,
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, report


def _headers(folder: Path) -> dict[str, _Header]:
    from safetensors import safe_open

    names = {"model.safetensors"}  # it goes before the index, as in transformers
    if not (folder / "model.safetensors").is_file():
        index = json.loads(read_text(folder / "model.safetensors.index.json"))
        names = set(index["weight_map"].values())
    headers: dict[str, _Header] = {}
    for file in sorted(folder / name for name in names):
        with safe_open(file, "pt") as stored:
            for name in stored.offset_keys():
                part = stored.get_slice(name)
                headers[name] = _Header(part.get_dtype(), tuple(part.get_shape()), file)
    return headers
