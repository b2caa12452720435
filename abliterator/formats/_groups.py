"""The groups of modules that a compressed-tensors config describes, and how each is stored.

As `compressed_tensors.quantization.quant_config` reads them: a module belongs to the group that has
its name among its `targets`, else to one with a pattern (`re:`) for it, else to one that names a
class of modules, unless `ignore` lists it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from abliterator.formats._patterns import matches
from abliterator.formats._scheme import Settings

# Formats in which an edit can be stored: type and bits of the numbers.
_STORED = {
    "float-quantized": {("float", "8")},
    "naive-quantized": {("float", "8"), ("int", "8")},
    "int-quantized": {("int", "8")},
    "pack-quantized": {("int", "4"), ("int", "8")},
    "nvfp4-pack-quantized": {("float", "4")},
}


def groups_of(settings: Settings) -> list[Mapping[str, Any]]:
    """All groups."""
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    return [group for group in groups if isinstance(group, Mapping)]


def is_known(settings: Settings) -> bool:
    """Whether an edit can be stored in every group's format, and nothing is sparse."""
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        return False
    quantised = [
        group for group in groups_of(settings) if isinstance(group.get("weights"), Mapping)
    ]
    return bool(quantised) and all(
        (str(group["weights"].get("type")), str(group["weights"].get("num_bits")))
        in _STORED.get(_format(group, settings), ())
        for group in quantised
    )


def weights_of(module: str, settings: Settings) -> Mapping[str, Any] | None:
    """How the config says that a module's weights are quantised, with `format`; None if not."""
    if is_listed(module, settings.get("ignore") or ()):
        return None
    group = next(_matching(module, settings), None)
    weights = None if group is None else group.get("weights")
    if group is None or not isinstance(weights, Mapping):
        return None
    return {**weights, "format": _format(group, settings)}


def is_listed(module: str, listed: Iterable[object]) -> bool:
    """Whether a module is among names and patterns."""
    return any(_matches(module, entry) for entry in listed)


def _matching(module: str, settings: Settings) -> Iterator[Mapping[str, Any]]:
    groups = [(group, _targets(group)) for group in groups_of(settings)]
    yield from (group for group, targets in groups if module in targets)
    yield from (group for group, targets in groups if is_listed(module, targets))
    # the name of a class, which only the model itself could tell apart
    yield from (
        group for group, targets in groups if any("." not in t and ":" not in t for t in targets)
    )


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets")
    return [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []


def _matches(module: str, entry: object) -> bool:
    if not isinstance(entry, str):
        return False
    if not entry.startswith("re:"):
        return entry == module
    return matches(entry.removeprefix("re:"), module)


def _format(group: Mapping[str, Any], settings: Settings) -> str:
    return str(group.get("format") or settings.get("format"))
