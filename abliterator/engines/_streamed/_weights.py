"""The weights of one part of a model at a time, read from its safetensors files.

A part is a block, or a module outside the blocks that has weights of its own: an embedding, a norm,
the head. What belongs to none of them (weights of modules that hold blocks) is read once and stays.
transformers' own conversion renames and fuses what the files store, as when it loads a whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from abliterator.checkpoint import Checkpoint
from abliterator.errors import CheckpointError
from abliterator.model import LoadedModel, loading

if TYPE_CHECKING:
    from transformers.modeling_utils import LoadStateDictConfig

META = "meta"


class PartialWeights:
    """Puts the weights of one part of a model into it, and takes them out again.

    Attributes:
        parts: module paths of all parts.
    """

    def __init__(self, loaded: LoadedModel, blocks: Sequence[str]) -> None:
        """Checks that every weight is in the files with its shape, by their headers.

        Args:
            loaded: a model without weights.
            blocks: module paths of its blocks.

        Raises:
            CheckpointError: if weights are missing or have another shape.
        """
        self._loaded, self._model = loaded, loaded.model
        self._checkpoint = Checkpoint.open(loaded.folder)
        self._config = _conversion(loaded)
        self._empty: dict[str, Tensor] = self._model.state_dict(keep_vars=True)
        self._sources = _sources(self._model, self._checkpoint, self._config)
        self._same = _same_tensors(self._model, self._empty)
        self.parts = _parts(self._model, blocks)
        self._part: str | None = None
        self._held: set[str] = set()
        inside = {name for part in self.parts for name in self._names_in(part)}
        resident = [name for name in self._empty if name not in inside]
        self._empty = {name: _nothing(x, loaded.device) for name, x in self._empty.items()}
        self._remove(self._put(list(self._empty), META))
        self._put(resident, loaded.device)

    def use(self, part: str) -> None:
        """Reads the weights of a part, and drops those of the part before, unless it is the same.

        Raises:
            CheckpointError: if a weight file was changed or cannot be read.
        """
        if self._part == part:
            return
        self.drop()
        self._held = self._put(self._names_in(part), self._loaded.device)
        self._part = part

    def drop(self) -> None:
        """Drops the weights of the part in use."""
        self._remove(self._held)
        self._held, self._part = set(), None

    @contextmanager
    def beside(self, part: str) -> Iterator[None]:
        """The model with the weights of a further part, as long as the context is open."""
        names = self._put(self._names_in(part), self._loaded.device) - self._held
        try:
            yield
        finally:
            self._remove(names)

    def _names_in(self, part: str) -> list[str]:
        return [f"{part}.{name}" for name in self._model.get_submodule(part).state_dict()]

    def _put(self, names: Sequence[str], device: str) -> set[str]:
        """Reads tensors of the model onto a device; on "meta", only their shapes are checked.

        Returns:
            The names of the tensors that now have numbers.
        """
        stored_names = {name: self._stored_name(name) for name in names}
        sources = {source for name in stored_names.values() for source in self._sources[name]}
        missing = self._convert(sources, device)
        for name, stored_name in stored_names.items():
            if stored_name in missing:
                raise CheckpointError(
                    f"transformers does not make {name} of what the weights in "
                    f"{self._loaded.folder} hold for it: another shape was expected. Download the "
                    "model again."
                )
            if stored_name != name:
                _set(self._model, name, _get(self._model, stored_name))
            _get(self._model, name).requires_grad_(False)
        return {*names, *stored_names.values()}

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            _set(self._model, name, self._empty[name])

    def _stored_name(self, name: str) -> str:
        """The name of a tensor that the files hold: this one, or one that shares its weights."""
        for candidate in (name, *self._same[name]):
            if candidate in self._sources:
                return candidate
        raise CheckpointError(
            f"The weights in {self._loaded.folder} lack {name}, which the model needs: it would be "
            "random numbers. Download the model again."
        )

    @contextmanager
    def _stored(self, names: Iterable[str], device: str) -> Iterator[dict[str, Any]]:
        """Tensors of the files by their names there, not read yet.

        They are mapped into memory, as `load_model` has them: a CPU's kernels may round otherwise
        where the same numbers begin at another address.
        """
        from safetensors import safe_open

        tensors = self._checkpoint.tensors
        if device == META:
            yield {name: torch.empty(tensors[name].shape, device=META) for name in names}
            return
        with ExitStack() as stack:
            files = {
                file: stack.enter_context(safe_open(self._loaded.folder / file, "pt"))
                for file in sorted({tensors[name].file for name in names})
            }
            yield {name: files[tensors[name].file].get_slice(name) for name in names}

    def _convert(self, names: Iterable[str], device: str) -> set[str]:
        """Lets transformers make tensors of stored ones; names of those that it did not make."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        config = replace(self._config, device_map={"": device})
        if device == META:
            config = replace(config, weight_mapping=_anywhere(config.weight_mapping or []))
        with loading(self._loaded.folder), self._stored(names, device) as state:
            report, _ = convert_and_load_state_dict_in_model(
                model=self._model, state_dict=state, load_config=config
            )
        return {*report.missing_keys, *(name for name, *_ in report.mismatched_keys)}


def _conversion(loaded: LoadedModel) -> LoadStateDictConfig:
    """How transformers makes a model's tensors of stored ones: names, fusions, dtypes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    model = loaded.model
    return LoadStateDictConfig(
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )


def _anywhere(mapping: Sequence[Any]) -> list[Any]:
    """Conversions that no longer ask for host memory: shapes are checked where nothing is held."""
    copies = [copy.copy(entry) for entry in mapping]
    for entry in copies:
        if getattr(entry, "force_cpu", False):
            entry.force_cpu = False
    return copies


def _sources(
    model: nn.Module, checkpoint: Checkpoint, config: LoadStateDictConfig
) -> dict[str, list[str]]:
    """Names of the stored tensors that each tensor of the model is made of."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping, tensors = config.weight_mapping or [], model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    sources: dict[str, list[str]] = {}
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    for name in checkpoint.tensors:
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, tensors)
        if target not in tensors and name in tensors:  # a published name like that of another
            target, pattern = rename_source_key(name, [], [], prefix, tensors)
        patterns = [""] if pattern is None else by_pattern[pattern].target_patterns
        for other in patterns:  # of a stored tensor that becomes several
            sources.setdefault(target.replace(patterns[0], other), []).append(name)
    return sources


def _same_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """By the name of a tensor, the other names that it has, and those that it is tied to."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        source = tied.get(name, name)
        groups.setdefault(id(tensors.get(source, tensor)), []).append(name)
    return {
        name: [other for other in group if other != name]
        for group in groups.values()
        for name in group
    }


def _parts(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """The blocks, and the topmost other modules with weights of their own that hold no block."""
    holders = {
        "",
        *(path.rsplit(".", n)[0] for path in blocks for n in range(1, path.count(".") + 1)),
    }
    parts = list(dict.fromkeys(blocks))
    for path, module in model.named_modules():
        within = any(path == part or path.startswith(f"{part}.") for part in parts)
        own = any(True for _ in module.parameters(recurse=False))
        if own and not within and path not in holders - set(blocks):
            parts.append(path)
    return parts


def _nothing(tensor: Tensor, device: str) -> Tensor:
    """What stands for a weight that is not there: its shape, dtype and device, and NaN for numbers.

    Code that reads it outside the part that holds it has NaN for a result, and no error of torch's:
    many models ask a weight for its device. A buffer stays as it is.
    """
    if not tensor.is_meta:
        return tensor
    number = torch.nan if tensor.is_floating_point() else 0
    value = torch.full((), number, dtype=tensor.dtype, device=device)
    return nn.Parameter(value.expand(tensor.shape), requires_grad=False)


def _get(model: nn.Module, name: str) -> Tensor:
    module, _, last = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), last)
    return tensor


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, last = name.rpartition(".")
    setattr(model.get_submodule(module), last, tensor)
