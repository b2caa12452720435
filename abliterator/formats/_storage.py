"""Quantisation of a whole checkpoint, as config.json and the safetensors headers describe it.

Each quantisation method is one entry of `SCHEMES`, or of refused.yaml; no other code in
abliterator depends on a method's name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from abliterator.errors import CheckpointError
from abliterator.formats._fp4 import compressed_nvfp4, is_modelopt, modelopt_nvfp4
from abliterator.formats._groups import is_known
from abliterator.formats._integers import (
    awq,
    compressed_integers,
    gptq,
    gptq_without,
    is_awq,
    is_gptq,
)
from abliterator.formats._layout import Layout, PlainLayout
from abliterator.formats._numbers import F8_E4M3, FORMATS, format_of
from abliterator.formats._refused import refused
from abliterator.formats._scaled import compressed_fp8, fp8, mxfp4
from abliterator.formats._scheme import Headers, Scheme, Settings, misfit

SETTINGS = "quantization_config"
"""Key of config.json under which loaders look for the method and its settings."""


@dataclass(frozen=True)
class Dequantized:
    """Changes of a checkpoint's headers and config when some tensors are dequantized.

    Attributes:
        layouts: by name, the present layout of each tensor that is dequantized: the edited ones,
            and those of the same experts, which loaders read by one rule.
        dropped: names of the scales that are left out then.
        settings: `quantization_config` afterwards; None where nothing is quantised any more.
        modules: the modules that are no longer quantised, for formats with a second file that lists
            them.
    """

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    settings: dict[str, Any] | None = None
    modules: tuple[str, ...] = ()

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
        """Name of the weight that a tensor of scales belongs to; of any other tensor, its own.

        A packed weight has the name of the plain one.
        """
        for ending, owner_ending in self.scheme.companions.items():
            if name.endswith(ending):
                return name.removesuffix(ending) + owner_ending
        return name

    def weight_name(self, name: str) -> str:
        """The name that a weight has in plain numbers; of any other tensor, its own."""
        return self.owner(name) if self.packs(name) else name

    def packs(self, name: str) -> bool:
        """Whether a tensor holds packed numbers, so that its shape is not the weight's."""
        return name.endswith(self.scheme.packed)

    def layout(self, name: str, headers: Headers) -> Layout:
        """How the tensor `name` is stored.

        Raises:
            UnsupportedModel: for a format that cannot be edited, or whose parts do not fit.
        """
        quantized = self.quantized_layout(name, headers)
        if quantized is not None:
            return quantized
        header = headers[name]
        if header.dtype == F8_E4M3.name:
            raise misfit(name, header, "config.json has no quantization_config that explains it")
        return PlainLayout(name, format_of(header.dtype, name).name, header.shape)

    def dequantized(self, headers: Headers, names: Collection[str]) -> Dequantized:
        """Changes of headers and config when the quantised tensors `names` are dequantized.

        Raises:
            UnsupportedModel: as `layout` does.
        """
        quantized = {
            name: layout
            for name in headers
            if (layout := self.quantized_layout(name, headers)) is not None
        }
        units = {_module(name) for name in names}
        layouts = {name: layout for name, layout in quantized.items() if _module(name) in units}
        if not layouts:
            return Dequantized(settings=dict(self.settings) or None)
        owners = {self.owner(name) for name in layouts}
        dropped = frozenset(
            name for name in headers if name not in layouts and self.owner(name) in owners
        )
        experts = self.scheme.experts
        modules = [experts(u) if u.endswith(".experts") else u for u in sorted(units, key=_order)]
        listed = tuple(modules) if self.scheme.inside else ()
        if len(layouts) == len(quantized):
            return Dequantized(layouts, dropped, None, listed)
        settings = self._settings_without(units, modules, headers, quantized)
        return Dequantized(layouts, dropped, settings, listed)

    def quantized_layout(self, name: str, headers: Headers) -> Layout | None:
        """The layout of a quantised weight; None for any other tensor, as scales are.

        Raises:
            UnsupportedModel: as `layout` does.
        """
        if self.owner(name) != name and not self.packs(name):
            return None
        return self.scheme.recognise(name, headers, self.settings)

    def _settings_without(
        self,
        units: Collection[str],
        modules: Collection[str],
        headers: Headers,
        quantized: Mapping[str, Layout],
    ) -> dict[str, Any]:
        if self.scheme.without is not None:
            rest = {n.rpartition(".")[0] for n in quantized if _module(n) not in units}
            changes = self.scheme.without(self.settings, [*modules], sorted(rest, key=_order))
            return {**self.settings, **changes}
        inner = self.settings.get(self.scheme.inside)
        settings = inner if isinstance(inner, Mapping) else self.settings
        skips = self.scheme.skips
        key = next((key for key in skips if settings.get(key) is not None), skips[0])
        listed = settings.get(key)
        if listed is None:
            listed = _never_quantised(headers, quantized)
        changed = {key: [*listed, *(name for name in modules if name not in listed)]}
        if settings is self.settings:
            return {**self.settings, **changed}
        return {**self.settings, self.scheme.inside: {**settings, **changed}}


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
    for key, listed in _listed(settings, scheme):
        if listed is not None and not isinstance(listed, list):
            raise CheckpointError(
                f"config.json says {SETTINGS}.{key}: {listed!r}, expected a list of modules that "
                "are not quantised. The file is damaged: download the model again."
            )
    return Storage(settings, scheme)


def _listed(settings: Settings, scheme: Scheme) -> Iterable[tuple[str, object]]:
    inner = settings.get(scheme.inside)
    for part in (settings, inner if isinstance(inner, Mapping) else {}):
        yield from ((key, part.get(key)) for key in scheme.skips)


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


def _compressed(name: str, headers: Headers, settings: Settings) -> Layout | None:
    for recognise in (compressed_integers, compressed_nvfp4, compressed_fp8):
        layout = recognise(name, headers, settings)
        if layout is not None:
            return layout
    if name.endswith(".weight_packed"):
        raise misfit(name, headers[name], "where I32 or U8 was expected")
    return None


def _as_pattern(experts: str) -> str:
    return f"re:{experts.replace('.', '[.]')}[.].*"


def _everything_in(experts: str) -> str:
    return f"{experts}*"


_COMPRESSED = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
)

_MODELOPT = Scheme(
    {
        **dict.fromkeys((".weight_scale", ".weight_scale_2", ".input_scale"), ".weight"),
        **dict.fromkeys((".k_scale", ".v_scale"), ".weight"),
    },
    recognise=modelopt_nvfp4,
    skips=("ignore", "exclude_modules"),
    inside="quantization",
    experts=_everything_in,
    fits=is_modelopt,
)

SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme(
        {"_scale_inv": "", ".activation_scale": ".weight", ".scale": ".weight"},
        recognise=fp8,
        skips=("modules_to_not_convert", "ignored_layers"),
    ),
    "compressed-tensors": Scheme(
        {f".{part}": ".weight" for part in _COMPRESSED},
        (".weight_packed",),
        _compressed,
        ("ignore",),
        experts=_as_pattern,
        fits=is_known,
    ),
    "mxfp4": Scheme({"_scales": "_blocks"}, recognise=mxfp4, skips=("modules_to_not_convert",)),
    "gptq": Scheme(
        {f".{part}": ".weight" for part in ("qweight", "qzeros", "scales", "g_idx")},
        (".qweight",),
        gptq,
        fits=is_gptq,
        without=gptq_without,
    ),
    "awq": Scheme(
        {f".{part}": ".weight" for part in ("qweight", "qzeros", "scales")},
        (".qweight",),
        awq,
        ("modules_to_not_convert",),
        fits=is_awq,
    ),
    "modelopt": _MODELOPT,
    "modelopt_fp4": _MODELOPT,
}
