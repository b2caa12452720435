"""Quantisation of a whole checkpoint, as config.json and the safetensors headers describe it.

Each quantisation method is one entry of `SCHEMES`, or of refused.yaml; no other code in
abliterator depends on a method's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from abliterator.errors import CheckpointError, UnsupportedModel
from abliterator.formats._layout import Layout, Mxfp4Layout, PlainLayout, ScaledLayout, Shape
from abliterator.formats._numbers import F8_E4M3, FORMATS, SCALE_DTYPES, format_of
from abliterator.formats._refused import refused

SETTINGS = "quantization_config"
"""Key of config.json under which loaders look for the method and its settings."""


class Header(Protocol):
    """The entry of one tensor in a safetensors header."""

    @property
    def dtype(self) -> str:
        """Safetensors' name of the format."""

    @property
    def shape(self) -> Shape:
        """Lengths of the axes as stored."""


Headers = Mapping[str, Header]
Settings = Mapping[str, Any]


def _is_plain(name: str, headers: Headers, settings: Settings) -> None:
    """No tensor is quantised; a function of a name, so that plans can be pickled."""


def _always(_: Settings) -> bool:
    return True


@dataclass(frozen=True)
class Scheme:
    """One quantisation method.

    Attributes:
        companions: endings of the names of tensors that belong to another, such as scales, and the
            ending of the other's name.
        recognise: the layout of the tensor `name` if it is quantised, else None.
        skips: keys of the settings for the list of modules that are not quantised; the first that
            is there is written to, or the first.
        experts: how the list names all experts of a block, given their module.
        fits: whether the settings are this scheme's, beyond its name.
    """

    companions: Mapping[str, str] = field(default_factory=dict)
    recognise: Callable[[str, Headers, Settings], Layout | None] = _is_plain
    skips: tuple[str, ...] = ()
    experts: Callable[[str], str] = str
    fits: Callable[[Settings], bool] = _always


@dataclass(frozen=True)
class Dequantized:
    """Changes of a checkpoint's headers and config when some tensors are dequantized.

    Attributes:
        layouts: by name, the present layout of each tensor that is dequantized: the edited ones,
            and those of the same experts, which loaders read by one rule.
        dropped: names of the scales that are left out then.
        settings: `quantization_config` afterwards; None where nothing is quantised any more.
    """

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    settings: dict[str, Any] | None = None

    @property
    def dense(self) -> dict[str, PlainLayout]:
        """The layout of each tensor of `layouts` afterwards, in `DENSE` (BF16)."""
        return {name: layout.dense for name, layout in self.layouts.items()}

    @property
    def config(self) -> dict[str, Any]:
        """New values of config.json's keys; None removes the key."""
        return {SETTINGS: self.settings} if self.layouts else {}


@dataclass(frozen=True)
class Storage:
    """How one checkpoint is stored; from `storage_of`."""

    settings: Settings = field(default_factory=dict)
    scheme: Scheme = field(default_factory=Scheme)

    def owner(self, name: str) -> str:
        """Name of the weight that a tensor of scales belongs to; of any other tensor, its own."""
        for ending, owner_ending in self.scheme.companions.items():
            if name.endswith(ending):
                return name.removesuffix(ending) + owner_ending
        return name

    def layout(self, name: str, headers: Headers) -> Layout:
        """How the tensor `name` is stored.

        Raises:
            UnsupportedModel: for a format that cannot be edited, or whose parts do not fit.
        """
        quantized = self.scheme.recognise(name, headers, self.settings)
        if quantized is not None:
            return quantized
        header = headers[name]
        if header.dtype == F8_E4M3.name:
            raise _misfit(name, header, "config.json has no quantization_config that explains it")
        return PlainLayout(name, format_of(header.dtype, name).name, header.shape)

    def dequantized(self, headers: Headers, names: Collection[str]) -> Dequantized:
        """Changes of headers and config when the quantised tensors `names` are dequantized.

        Raises:
            UnsupportedModel: as `layout` does.
        """
        quantized = {
            name: layout
            for name in headers
            if (layout := self.scheme.recognise(name, headers, self.settings)) is not None
        }
        units = {_module(name) for name in names}
        layouts = {name: layout for name, layout in quantized.items() if _module(name) in units}
        if not layouts:
            return Dequantized(settings=dict(self.settings) or None)
        dropped = frozenset(
            name for name in headers if name not in layouts and self.owner(name) in layouts
        )
        if len(layouts) == len(quantized):
            return Dequantized(layouts, dropped)
        return Dequantized(layouts, dropped, self._settings_without(units, headers, quantized))

    def _settings_without(
        self, units: Collection[str], headers: Headers, quantized: Mapping[str, Layout]
    ) -> dict[str, Any]:
        skips = self.scheme.skips
        key = next((key for key in skips if self.settings.get(key) is not None), skips[0])
        listed = self.settings.get(key)
        if listed is None:
            listed = _never_quantised(headers, quantized)
        experts = self.scheme.experts
        added = [experts(u) if u.endswith(".experts") else u for u in sorted(units, key=_order)]
        return {**self.settings, key: [*listed, *(name for name in added if name not in listed)]}


def storage_of(config: Mapping[str, Any], made_from: Collection[str] = ()) -> Storage:
    """How the checkpoint of a parsed config.json is stored.

    Args:
        config: config.json, parsed.
        made_from: ids of the model that the checkpoint's card says it was made from, for an error.

    Raises:
        CheckpointError: where the list of modules that are not quantised is no list.
        UnsupportedModel: for a quantisation method in which no edit can be stored.
    """
    settings = config.get(SETTINGS)
    if not settings:
        return Storage()
    settings = settings if isinstance(settings, Mapping) else {"quant_method": settings}
    method = str(settings.get("quant_method", "an unnamed method"))
    scheme = SCHEMES.get(method)
    if scheme is None or not scheme.fits(settings):
        raise refused(method, settings, made_from)
    for key in scheme.skips:
        listed = settings.get(key)
        if listed is not None and not isinstance(listed, list):
            raise CheckpointError(
                f"config.json says {SETTINGS}.{key}: {listed!r}, expected a list of modules that "
                "are not quantised. The file is damaged: download the model again."
            )
    return Storage(settings, scheme)


def _module(name: str) -> str:
    """The module that a loader replaces as a whole: a linear one, or all experts of a block."""
    before, experts, _ = name.partition(".experts.")
    return f"{before}.experts" if experts else name.rpartition(".")[0]


def _order(name: str) -> list[tuple[int, str]]:
    """Sort key of a module path that orders block numbers numerically."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _never_quantised(headers: Headers, quantized: Mapping[str, Layout]) -> list[str]:
    """Modules with a matrix that the base has in plain numbers.

    Where the settings list none, loaders have a default of their own, which a list switches off.
    """
    plain_modules = {
        _module(name)
        for name, header in headers.items()
        if header.dtype in FORMATS and len(header.shape) > 1 and name.endswith(".weight")
    }
    plain_modules -= {_module(name) for name in quantized}
    return sorted({*plain_modules, "lm_head"}, key=_order)


def _fp8(name: str, headers: Headers, settings: Settings) -> Layout | None:
    """FP8 as DeepSeek and Qwen store it: scales in `weight_scale_inv`, by blocks or one for all."""
    return _scaled(name, headers, f"{name}_scale_inv", settings.get("weight_block_size"))


def _compressed_fp8(name: str, headers: Headers, settings: Settings) -> Layout | None:
    """FP8 of compressed-tensors: `weight_scale` for a tensor, each row, or blocks."""
    groups = [group.get("weights") or {} for group in _groups(settings)]
    blocks = [group["block_structure"] for group in groups if group.get("block_structure")]
    return _scaled(name, headers, f"{name}_scale", blocks[0] if blocks else None)


def _mxfp4(name: str, headers: Headers, settings: Settings) -> Layout | None:
    if not name.endswith("_blocks"):
        return None
    header, weight_name = headers[name], name.removesuffix("_blocks")
    scales = f"{weight_name}_scales"
    fits = (
        scales in headers
        and (headers[scales].dtype, headers[scales].shape) == ("U8", header.shape[:-1])
        and (header.dtype, len(header.shape), header.shape[-1:]) == ("U8", 4, (16,))
    )
    if not fits:
        raise UnsupportedModel(
            f"Tensor {name} ({header.dtype}, {list(header.shape)}) is not stored as MXFP4 is: "
            f"U8 [experts, d_model, blocks, 16] beside {scales}, U8 [experts, d_model, blocks]. "
            "Download the model again, or use its bfloat16 checkpoint."
        )
    return Mxfp4Layout(name, header.dtype, header.shape, scales, weight_name)


def _scaled(name: str, headers: Headers, scales: str, block: object) -> Layout | None:
    header, scale = headers[name], headers.get(scales)
    if header.dtype != F8_E4M3.name:
        return None
    if scale is None:
        raise _misfit(name, header, f"without its scales {scales}")
    fit = _blocks(header.shape, scale.shape, block)
    if fit is None or scale.dtype not in SCALE_DTYPES or len(header.shape) not in (2, 3):
        raise _misfit(
            name,
            header,
            f"with scales {scales} ({scale.dtype}, {list(scale.shape)}), which are neither one for "
            "all, nor one a row, nor one for each block that config.json gives the size of",
        )
    kind, size = fit
    return ScaledLayout(name, header.dtype, header.shape, scales, size, scale.dtype, kind)


def _blocks(shape: Shape, scales: Shape, block: object) -> tuple[str, Shape] | None:
    """Kind of FP8 scales of this shape, and sizes of a block on every axis; None for no fit."""
    outer, inner = shape[:-2], shape[-2:]
    if math.prod(scales) == 1 and not outer:
        return "FP8, a scale a tensor", shape
    if math.prod(scales) == math.prod(shape[:-1]) and scales[-1:] in ((1,), shape[-2:-1]):
        return "FP8, a scale a row", (*(1 for _ in shape[:-1]), shape[-1])
    size = _pair(block)
    if size is None or scales != (*outer, *(-(-n // b) for n, b in zip(inner, size, strict=True))):
        return None
    if outer and any(n % b for n, b in zip(inner, size, strict=True)):
        return None  # blocks of experts whose rows lie one after the other would not line up
    return "FP8, a scale a block", (*(1 for _ in outer), *size)


def _pair(block: object) -> tuple[int, int] | None:
    if not isinstance(block, list) or len(block) != 2:
        return None
    rows, columns = block
    whole = type(rows) is int and type(columns) is int and rows > 0 and columns > 0
    return (rows, columns) if whole else None


def _misfit(name: str, header: Header, fault: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"Tensor {name} {list(header.shape)} is stored as {header.dtype} {fault}. A checkpoint "
        "with weights, scales and quantization_config that belong together was expected: download "
        "it again, or use the model in bfloat16."
    )


def _groups(settings: Settings) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    return [group for group in groups if isinstance(group, Mapping)]


def _is_fp8(settings: Settings) -> bool:
    """Whether a compressed-tensors checkpoint is all FP8, as numbers and scales."""
    groups = _groups(settings)
    stored = {str(group.get("format") or settings.get("format")) for group in groups}
    kinds = {
        (str(weights.get("type")), str(weights.get("num_bits")))
        for group in groups
        if isinstance(weights := group.get("weights"), Mapping)
    }
    return kinds == {("float", "8")} and stored <= {"float-quantized", "naive-quantized"}


def _as_pattern(experts: str) -> str:
    return f"re:{experts.replace('.', '[.]')}[.].*"


SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme(
        {"_scale_inv": "", ".activation_scale": ".weight"},
        _fp8,
        ("modules_to_not_convert", "ignored_layers"),
    ),
    "compressed-tensors": Scheme(
        {".weight_scale": ".weight", ".input_scale": ".weight", ".output_scale": ".weight"},
        _compressed_fp8,
        ("ignore",),
        _as_pattern,
        _is_fp8,
    ),
    "mxfp4": Scheme({"_scales": "_blocks"}, _mxfp4, ("modules_to_not_convert",)),
}
