"""Which tensors of a checkpoint write the residual stream: a table per architecture.

The table is `architectures.yaml` beside this file. The room reads a parsed config.json and tensor
names with their shapes; it opens no checkpoint, knows no directions, and never guesses a side from
a shape. Nothing is skipped silently: a tensor that the table does not claim is an error that names
it.

    anatomy = anatomy_of(json.loads((folder / "config.json").read_text()))
    for writer in anatomy.writers({"model.embed_tokens.weight": (49152, 576), ...}):
        writer.name, writer.component, writer.layer, writer.axis
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from abliterator.errors import CheckpointError, UnsupportedModel

Component = Literal["attention", "mlp", "embedding"]
Kind = Literal["weight", "bias"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Writer:
    """One tensor that writes the residual stream.

    Attributes:
        name: tensor name on disk.
        module: path of the module whose output is the write.
        component: which part of the block it belongs to.
        layer: block index from 0 (its output is residual layer + 1); -1 for embeddings.
        axis: the tensor's axis that lies in the residual stream.
        kind: "weight", or "bias" for a vector [d_model].
    """

    name: str
    module: str
    component: Component
    layer: int
    axis: int
    kind: Kind


@dataclass(frozen=True)
class Anatomy:
    """What the table says of one model.

    Attributes:
        model_type: as in config.json.
        n_layers: number of blocks L; candidate residual layers are 1..L.
        d_model: width H of the residual stream.
        blocks: module path of the list of blocks, e.g. "model.layers".
        tied_embeddings: whether lm_head is the embedding: an edit of one would be an edit of both.
    """

    model_type: str
    n_layers: int
    d_model: int
    blocks: str
    tied_embeddings: bool
    _family: _Family = field(repr=False)

    def writers(self, shapes: Mapping[str, Shape]) -> tuple[Writer, ...]:
        """Every writer among the tensors of a checkpoint: embeddings, then block by block.

        Args:
            shapes: name and shape of *every* tensor of the checkpoint.

        Raises:
            UnsupportedModel: for a tensor that the table does not claim, a block index that the
                config does not have, an expected writer that is missing, or one whose writing axis
                is not d_model long; the tensor is named.
        """
        expected = {writer.name: writer for writer in self._expected(shapes)}
        for name in shapes:
            if name not in expected:
                self._check_claimed(name)
        for writer in expected.values():
            self._check_shape(writer, shapes)
        return tuple(expected.values())

    def _expected(self, shapes: Mapping[str, Shape]) -> Iterator[Writer]:
        """The writers that a whole checkpoint has, biases where any block has them."""
        family = self._family
        with_bias = {
            part.module
            for part in family.writers
            if any(self._module(part, layer) + ".bias" in shapes for layer in range(self.n_layers))
        }
        for part in family.embeddings:
            yield Writer(
                f"{part.module}.weight", part.module, part.component, -1, part.axis, "weight"
            )
        for layer in range(self.n_layers):
            for part in family.writers:
                module = self._module(part, layer)
                yield Writer(f"{module}.weight", module, part.component, layer, part.axis, "weight")
                if part.module in with_bias:
                    yield Writer(f"{module}.bias", module, part.component, layer, 0, "bias")

    def _check_claimed(self, name: str) -> None:
        """Stops at a tensor that is neither an expected writer nor a known reader of this model."""
        match = next((m for p in self._family.claims if (m := p.fullmatch(name))), None)
        if match is None:
            raise UnsupportedModel(
                f"The checkpoint has a tensor {name} that is not known for model_type "
                f"{self.model_type!r}. It could write the residual stream, so nothing is edited. "
                f"If the model is a plain {self.model_type}, convert or re-download the "
                "checkpoint; if it is a variant, its tensors need an entry in "
                "abliterator/anatomy/architectures.yaml."
            )
        layer = match.groupdict().get("layer")
        if layer is not None and int(layer) >= self.n_layers:
            raise UnsupportedModel(
                f"The checkpoint has a tensor {name}, but config.json says that there are "
                f"{self.n_layers} blocks (0 to {self.n_layers - 1}). Use a checkpoint whose config "
                "and weights belong together."
            )

    def _check_shape(self, writer: Writer, shapes: Mapping[str, Shape]) -> None:
        """Stops at a writer that is not there, or that does not write d_model numbers."""
        if writer.name not in shapes:
            raise UnsupportedModel(
                f"The checkpoint has no tensor {writer.name}, which a {self.model_type} with "
                f"{self.n_layers} blocks needs: it writes the residual stream. Use a complete "
                "checkpoint of the model."
            )
        shape = shapes[writer.name]
        dimensions = 2 if writer.kind == "weight" else 1
        if len(shape) != dimensions or shape[writer.axis] != self.d_model:
            raise UnsupportedModel(
                f"Tensor {writer.name} has shape {list(shape)}, expected {dimensions} dimensions "
                f"with {self.d_model} (hidden_size in config.json) on axis {writer.axis}, the one "
                "that writes the residual stream. The tensor may be packed by a quantiser: use an "
                "unquantised checkpoint of the model."
            )

    @staticmethod
    def _module(part: _Part, layer: int) -> str:
        return part.module.replace("{layer}", str(layer))


def anatomy_of(config: Mapping[str, Any]) -> Anatomy:
    """The anatomy of the model that a parsed config.json describes.

    Raises:
        UnsupportedModel: for a model_type that is not in the table, and for quantised weights.
        CheckpointError: where config.json lacks a number that every model has.
    """
    model_type = str(config.get("model_type"))
    family = _family_of(model_type, wrapper="text_config" in config)
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "an unnamed method")
        raise UnsupportedModel(
            f"The checkpoint is quantised ({method}): its tensors are packed, and editing such "
            "formats is not supported yet. Use the float32, float16 or bfloat16 checkpoint of the "
            "model."
        )
    tied = config.get("tie_word_embeddings", family.tied_by_default)
    return Anatomy(
        model_type=model_type,
        n_layers=_size(config, "num_hidden_layers"),
        d_model=_size(config, "hidden_size"),
        blocks=family.blocks,
        tied_embeddings=bool(tied),
        _family=family,
    )


def known_model_types() -> tuple[str, ...]:
    """Every model_type in the table, sorted."""
    return tuple(sorted(_table()[0]))


@dataclass(frozen=True)
class _Part:
    """A line under `writers` or `embeddings`."""

    module: str
    component: Component
    axis: int


@dataclass(frozen=True)
class _Family:
    """An entry of the table; `claims` are the names that it knows."""

    blocks: str
    tied_by_default: bool
    writers: tuple[_Part, ...]
    embeddings: tuple[_Part, ...]
    claims: tuple[re.Pattern[str], ...]


def _family_of(model_type: str, *, wrapper: bool) -> _Family:
    families, post_sublayer_norms = _table()
    if model_type in families:
        return families[model_type]
    if model_type in post_sublayer_norms:
        raise UnsupportedModel(
            f"Models of type {model_type!r} have a norm after each sublayer, whose gain multiplies "
            "what is written to the residual stream: the plain formula would leave part of the "
            "write behind, and the formula with the gain is not supported yet. Supported are: "
            f"{', '.join(sorted(families))}."
        )
    hint = " (config.json has a text_config: a wrapper of several models)" if wrapper else ""
    raise UnsupportedModel(
        f"No architecture of type {model_type!r}{hint} is known, so its writers of the residual "
        f"stream are not either. Supported are: {', '.join(sorted(families))}. Others need an "
        "entry in abliterator/anatomy/architectures.yaml."
    )


@cache
def _table() -> tuple[dict[str, _Family], frozenset[str]]:
    """The families by model_type, and the types refused for their post-sublayer norms."""
    text = files("abliterator.anatomy").joinpath("architectures.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    families = {name: _family(entry) for entry in data["families"] for name in entry["model_types"]}
    return families, frozenset(data["post_sublayer_norms"])


def _family(entry: Mapping[str, Any]) -> _Family:
    writers = tuple(_Part(**part) for part in entry["writers"])
    modules = [part.module for part in writers]
    # A writer of a block that the config does not have is still recognised as one, so the error
    # says so.
    names = [*entry["others"], *(f"{module}.{{weight,bias}}" for module in modules)]
    return _Family(
        blocks=entry["blocks"],
        tied_by_default=entry["tied_by_default"],
        writers=writers,
        embeddings=tuple(_Part(component="embedding", **part) for part in entry["embeddings"]),
        claims=tuple(_pattern(name) for name in names),
    )


def _pattern(name: str) -> re.Pattern[str]:
    """A name of the table as a regular expression: {layer} is an index, {a,b} is a choice."""
    pieces = re.split(r"\{([^}]*)\}", name)
    pieces[::2] = map(re.escape, pieces[::2])
    pieces[1::2] = map(_placeholder, pieces[1::2])
    return re.compile("".join(pieces))


def _placeholder(inside: str) -> str:
    if inside == "layer":
        return r"(?P<layer>0|[1-9][0-9]*)"
    return "(?:" + "|".join(map(re.escape, inside.split(","))) + ")"


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:  # JSON's true would pass as an int
        raise CheckpointError(
            f"config.json says {key}: {value!r}, expected a positive whole number. The file is "
            f"incomplete or damaged: download the model again."
        )
    return value
