"""Reads the table into types: shapes merged into families, names compiled to patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from abliterator.files import package_yaml

Component = Literal[
    "attention",
    "linear_attention",
    "ssm",
    "convolution",
    "mlp",
    "expert",
    "shared_expert",
    "per_layer_input",
    "embedding",
]


@dataclass(frozen=True)
class Part:
    """A line under `writers` or `embeddings`: the names and layout of one kind of writer.

    The fields are explained at the head of architectures.yaml.
    """

    module: str
    tensor: str
    bias: str
    component: Component
    axis: int = 0
    gains: tuple[tuple[str, ...], ...] = ()
    one_of: str | None = None
    optional: bool = False
    beside: str | None = None
    fused: bool = False
    packed: bool = False
    either_order: bool = False
    experts_after: int = 0
    adds_copies: bool = False

    @property
    def per_expert(self) -> bool:
        """Whether each expert has a tensor of its own on disk."""
        return "{expert}" in self.tensor


def _several(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


Names = Annotated[tuple[str, ...], BeforeValidator(_several)]


class Family(BaseModel):
    """An entry of the table, merged with the shape that it is based on.

    The names of `others` become patterns, as those of writers do, when they are first used: a
    run needs those of one family, and all of them take longer than a small model takes to bake.
    """

    model_config = ConfigDict(frozen=True)

    blocks: str
    n_layers: Names = ("num_hidden_layers",)
    d_model: Names = ("hidden_size",)
    tied_by_default: bool = False
    base_prefix: str = ""
    gain_offset: float = 0.0
    requires: Mapping[str, Any] = {}
    writers: tuple[Part, ...]
    embeddings: tuple[Part, ...]
    others: tuple[str, ...]
    sizes_left_out: Mapping[str, int] = {}
    partial: str | None = None
    streams_first: bool = False
    sublayers: tuple[tuple[str, ...], ...] = ()

    @cached_property
    def writer_names(self) -> tuple[re.Pattern[str], ...]:
        """Names of the weights and biases of writers."""
        return tuple(_pattern(name) for p in self.writers for name in (p.tensor, p.bias))

    @cached_property
    def reader_names(self) -> tuple[re.Pattern[str], ...]:
        """Names of tensors that are never edited."""
        return tuple(_pattern(name) for name in self.others)


@dataclass(frozen=True)
class Wrapper:
    """A model that holds a causal LM beside other parts; by default one that is nothing else.

    `prefixes` map names on disk to the LM's; `run_time` replaces its `model.` in memory.
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    run_time: str | None = None
    left_alone: Mapping[str, str] = field(default_factory=dict)

    def at_run_time(self, module: str) -> str:
        """Path of a module of the language model in the loaded wrapper."""
        return module if self.run_time is None else self.run_time + module.removeprefix("model.")


@dataclass(frozen=True)
class Predictors:
    """Name prefixes and config keys of blocks that predict further tokens, and of draft modules."""

    prefixes: tuple[str, ...]
    drafts: tuple[str, ...]
    counted_by: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """architectures.yaml: families and wrappers by model_type, and types refused by reason."""

    families: Mapping[str, Family]
    wrappers: Mapping[str, Wrapper]
    predictors: Predictors
    refused: Mapping[str, str]

    @property
    def partial(self) -> Mapping[str, str]:
        """What remains in the stream, by model_type of which only the writers can be edited."""
        reasons = {name: why for name, family in self.families.items() if (why := family.partial)}
        of_text = {name: reasons.get(f"{name}_text") for name in self.wrappers}
        return {**reasons, **{name: why for name, why in of_text.items() if why}}


@cache
def table() -> Table:
    """The table, read once."""
    data = package_yaml("abliterator.anatomy", "architectures.yaml")
    families = {
        name: family
        for entry in data["families"]
        for family in [_family(entry, data["shapes"])]
        for name in entry["model_types"]
    }
    wrappers = {
        name: _wrapper(entry, data["wrapped"])
        for entry in data["wrappers"]
        for name in _flat(entry["model_types"])
    }
    predictors = Predictors(**{key: tuple(names) for key, names in data["predictors"].items()})
    refused = {name: why for why, names in data["refused"].items() for name in _flat(names)}
    return Table(families, wrappers, predictors, refused)


def _wrapper(entry: Mapping[str, Any], common: Mapping[str, Any]) -> Wrapper:
    left_alone = {
        before + name: label
        for label, names in common["left_alone"].items()
        for name in names
        for before in ("", "model.")
    }
    return Wrapper(common["prefixes"], entry["run_time"], left_alone)


def _family(entry: Mapping[str, Any], shapes: Mapping[str, Any]) -> Family:
    shape = shapes[entry["shape"]] if "shape" in entry else {}
    merged = {**shape, **entry}
    blocks = merged.get("blocks", "model.layers")
    embeddings = [{"component": "embedding", "axis": 1, **line} for line in merged["embeddings"]]
    others = [*_flat(shape.get("others", ())), *_flat(entry.get("others", ()))]
    parts = {
        "blocks": blocks,
        "writers": tuple(part for line in merged["writers"] for part in _parts(line, blocks)),
        "embeddings": tuple(part for line in embeddings for part in _parts(line, blocks)),
        "others": tuple(_within(name, blocks) for name in others),
        "sublayers": tuple(_alternatives(line, blocks) for line in merged.get("sublayers", ())),
    }
    return Family.model_validate({**merged, **parts})


def _flat(names: Iterable[Any]) -> Iterator[str]:
    """A list that may hold lists: YAML's aliases nest."""
    for name in names:
        if isinstance(name, str):
            yield name
        else:
            yield from _flat(name)


def _parts(line: Mapping[str, Any], blocks: str) -> Iterator[Part]:
    """A line of the table: as many parts as its tensor has names, of which a block has one."""
    tensors = _several(line.get("tensor", line["module"] + ".weight"))
    for tensor in tensors:
        alternatives = {"one_of": line.get("one_of", line["module"])} if len(tensors) > 1 else {}
        yield _part({**line, **alternatives, "tensor": tensor}, blocks)


def _part(line: Mapping[str, Any], blocks: str) -> Part:
    tensor = line["tensor"]
    bias = line.get("bias", tensor.removesuffix(".weight") + ".bias")
    names = {"module": line["module"], "tensor": tensor, "bias": bias}
    fields: dict[str, Any] = {key: _within(name, blocks) for key, name in names.items()}
    fields |= {key: value for key, value in line.items() if key not in (*names, "gain")}
    gains = tuple(_alternatives(gain, blocks) for gain in _several(line.get("gain", ())))
    return Part(gains=gains, **fields)


def _alternatives(names: str, blocks: str) -> tuple[str, ...]:
    """Names in full, of which "a|b" lists several."""
    return tuple(_within(name, blocks) for name in names.split("|"))


def _within(name: str, blocks: str) -> str:
    """A name of the table in full: one that begins with a dot is within every block."""
    return f"{blocks}.{{layer}}{name}" if name.startswith(".") else name


def _pattern(name: str) -> re.Pattern[str]:
    """A name as a regular expression: {layer}, {expert} are indices, {a,b} is a choice."""
    pieces = re.split(r"\{([^}]*)\}", name)
    pieces[::2] = map(re.escape, pieces[::2])
    pieces[1::2] = map(_placeholder, pieces[1::2])
    return re.compile("".join(pieces))


def _placeholder(inside: str) -> str:
    if inside in ("layer", "expert"):
        return rf"(?P<{inside}>0|[1-9][0-9]*)"
    return "(?:" + "|".join(map(re.escape, inside.split(","))) + ")"
