"""The anatomy of one model: every tensor of a checkpoint classified by the table."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from abliterator.anatomy._table import Component, Family, Part, Wrapper, table
from abliterator.errors import UnsupportedModel
from abliterator.formats import Storage

Kind = Literal["weight", "bias"]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_MIXERS = ("attention", "linear_attention", "ssm", "convolution")


@dataclass(frozen=True)
class Writer:
    """One tensor that writes: its product is added to the residual stream.

    Attributes:
        name: tensor name on disk.
        module: path of the run-time module whose output is the write; experts share theirs.
        component: which part of the block it belongs to.
        layer: block index from 0 (its output is residual layer + 1); -1 for embeddings.
        axis: the tensor's axis of length d_model, the residual stream.
        kind: "weight", or "bias" for a vector [d_model].
        gains: tensors [d_model] whose product multiplies the write: norms after the sublayer.
        gain_offset: what is added to each gain as stored (1 where a norm multiplies by 1 + weight).
        expert: which expert's it is, where each has a tensor of its own.
        adds_copies: whether its module adds copies of its input too, which no weight makes.
        fused: whether the tensor's first axis counts experts.
        packed: whether the weight is in MXFP4: [expert, d_model, blocks, 16] bytes of two numbers.
        either_order: whether the order of the last two axes has to be inferred from their lengths.
    """

    name: str
    module: str
    component: Component
    layer: int
    axis: int
    kind: Kind
    gains: tuple[str, ...] = ()
    gain_offset: float = 0.0
    fused: bool = False
    packed: bool = False
    either_order: bool = False
    expert: int | None = None
    adds_copies: bool = False


@dataclass(frozen=True)
class Anatomy:
    """Sizes and writers of one model, from the table and config.json.

    Attributes:
        model_type: as in config.json.
        n_layers: number of blocks L; candidate residual layers are 1..L.
        d_model: width H of the residual stream.
        blocks: module path of the list of blocks, e.g. "model.layers".
        tied_embeddings: whether lm_head is the embedding: an edit of one would be an edit of both.
        n_experts: routed experts of a block; 0 where there are none.
        extra_blocks: blocks after the last one, which predict further tokens (MTP): left alone.
        storage: how its weights are stored.
        sublayers: where a block holds several residual streams (hyper-connections), module paths,
            with {layer}, of what it mixes into them: of every entry, a block has one. Else empty.
    """

    model_type: str
    n_layers: int
    d_model: int
    blocks: str
    tied_embeddings: bool
    n_experts: int = 0
    extra_blocks: int = 0
    storage: Storage = field(default_factory=Storage)
    sublayers: tuple[tuple[str, ...], ...] = ()
    _family: Family = field(kw_only=True, repr=False)
    _wrapper: Wrapper = field(default_factory=Wrapper, kw_only=True, repr=False)

    @property
    def partial(self) -> str | None:
        """Why the stream keeps a subspace that no writer writes; None where it does not."""
        return self._family.partial

    @property
    def rows_axis(self) -> int:
        """The axis of a block's output that counts the rows of a batch: of [S, B, T, H] it is 1."""
        return int(self._family.streams_first)

    def writers(self, shapes: Mapping[str, Shape]) -> tuple[Writer, ...]:
        """Every writer among the tensors of a checkpoint: embeddings, then block by block.

        Args:
            shapes: name and shape of *every* tensor of the checkpoint.

        Raises:
            UnsupportedModel: for a tensor that the table does not claim, a block or an expert that
                the config does not have, an expected writer or gain that is missing, or one whose
                writing axis is not d_model long; the tensor is named.
        """
        if self.n_layers > len(shapes):
            raise UnsupportedModel(
                f"config.json says that there are {self.n_layers} blocks, and the checkpoint has "
                f"{len(shapes)} tensors, less than one a block. Use a checkpoint whose config and "
                "weights belong together."
            )
        on_disk = self._on_disk(shapes)
        expected = {writer.name: writer for writer in self._expected(on_disk)}
        self._check_present(expected.values(), on_disk)
        for table_name, name in on_disk.items():
            if table_name not in expected and not self._left_alone(table_name):
                self._check_claimed(table_name, name)
        writers = []
        for planned in expected.values():
            writer = self._with_axis_by_length(planned, on_disk, shapes)
            self._check_shape(writer, on_disk, shapes)
            writers.append(
                replace(
                    writer,
                    name=on_disk[writer.name],
                    module=self._wrapper.at_run_time(writer.module),
                    gains=tuple(on_disk[gain] for gain in writer.gains),
                )
            )
        return tuple(writers)

    def _on_disk(self, names: Collection[str]) -> dict[str, str]:
        """Names on disk by the table's."""
        on_disk: dict[str, str] = {}
        for name in names:
            other = on_disk.setdefault(self._table_name(name), name)
            if other != name:
                raise UnsupportedModel(
                    f"The checkpoint has one weight in two forms, {other} and {name}: which of "
                    "them a loader would take is not clear. Use a checkpoint in one format."
                )
        return on_disk

    def left_alone(self, names: Collection[str]) -> dict[str, int]:
        """Number of tensors, by label, outside the language model's stream: they stay unedited."""
        counts: dict[str, int] = defaultdict(int)
        for name in names:
            label = self._left_alone(self._table_name(name))
            if label:
                counts[label] += 1
        return dict(counts)

    def _table_name(self, name: str) -> str:
        """A tensor's name in the language model's own checkpoint, from its name on disk.

        Packed numbers have the name of the weight that they are.
        """
        name = self.storage.weight_name(name)
        for prefix_on_disk, prefix in self._wrapper.prefixes.items():
            if name.startswith(prefix_on_disk):
                return prefix + name.removeprefix(prefix_on_disk)
        base = self._family.base_prefix
        if base and not name.startswith((base, "lm_head.")):
            return base + name
        return name

    def _left_alone(self, table_name: str) -> str | None:
        """The label of a tensor that is not to be touched, or None."""
        for prefix, label in self._wrapper.left_alone.items():
            if table_name.startswith(prefix):
                return label
        extra = range(self.n_layers, self.n_layers + self.extra_blocks)
        table_of = table().predictors
        predictors = (*table_of.prefixes, *(f"{self._family.blocks}.{n}." for n in extra))
        if table_name.startswith(predictors):
            return "blocks that predict further tokens (MTP)"
        return "draft modules" if table_name.startswith(table_of.drafts) else None

    def _expected(self, table_names: Collection[str]) -> Iterator[Writer]:
        """The writers that a whole checkpoint has, named as the table does."""
        for parts in _slots(self._family.embeddings):
            present = [part for part in parts if part.tensor in table_names]
            for part in present or [part for part in parts[:1] if not part.optional]:
                yield self._writer(part, part.tensor, -1, "weight")
        blocks = [self._parts_of(layer, table_names) for layer in range(self.n_layers)]
        biased = {
            part
            for layer, parts in enumerate(blocks)
            for part in parts
            if any(name in table_names for name in self._names(part, part.bias, layer))
        }
        kind: Kind
        for layer, parts in enumerate(blocks):
            for part in parts:
                biases = self._names(part, part.bias, layer) if part in biased else []
                gains = self._gains(part, layer, table_names)
                weights = self._names(part, part.tensor, layer)
                for kind, names in (("weight", weights), ("bias", biases)):
                    for i, name in zip(self._indices(part), names, strict=False):
                        writer = self._writer(part, name, layer, kind, gains)
                        expert = i if part.per_expert else None
                        yield replace(writer, expert=expert, adds_copies=part.adds_copies)

    def _parts_of(self, layer: int, table_names: Collection[str]) -> list[Part]:
        """The parts of one block: of alternatives the one that is there, else the first."""
        chosen: list[Part] = []
        for parts in _slots(self._family.writers):
            components = {part.component for part in chosen}
            parts = [part for part in parts if part.beside is None or part.beside in components]
            present = [part for part in parts if self._has(part, layer, table_names)]
            if len(present) > 1:
                raise UnsupportedModel(
                    f"Block {layer} has both {present[0].tensor} and {present[1].tensor}: which of "
                    f"them a {self.model_type} would load is not clear. Use a checkpoint as "
                    "save_pretrained writes it."
                )
            # optional parts are in all blocks or in none
            layers = range(self.n_layers)
            chosen += present or [
                part
                for part in parts[:1]
                if not part.optional or any(self._has(part, i, table_names) for i in layers)
            ]
        return chosen

    def _has(self, part: Part, layer: int, table_names: Collection[str]) -> bool:
        return any(name in table_names for name in self._names(part, part.tensor, layer))

    def _names(self, part: Part, pattern: str, layer: int) -> list[str]:
        name = pattern.replace("{layer}", str(layer))
        if "{expert}" not in name:
            return [name]
        return [name.replace("{expert}", str(expert)) for expert in self._indices(part)]

    def _indices(self, part: Part) -> range:
        """Indices of a part's experts on disk; one index for what is no expert's own."""
        if not part.per_expert:
            return range(1)
        first = part.experts_after * self.n_experts
        return range(first, first + self.n_experts)

    def _gains(self, part: Part, layer: int, table_names: Collection[str]) -> tuple[str, ...]:
        """Names of the gains: of several names the one that is there; with a "?", perhaps none."""
        gains: list[str] = []
        for names in part.gains:
            names = tuple(name.replace("{layer}", str(layer)) for name in names)
            present = [name for name in names if name.removesuffix("?") in table_names]
            gains += present[:1] or [name for name in names[:1] if not name.endswith("?")]
        return tuple(name.removesuffix("?") for name in gains)

    def _writer(
        self, part: Part, name: str, layer: int, kind: Kind, gains: tuple[str, ...] = ()
    ) -> Writer:
        # a bias is [d_model], or [experts, d_model]
        axis = part.axis if kind == "weight" else int(part.fused)
        return Writer(
            name,
            part.module.replace("{layer}", str(layer)),
            part.component,
            layer,
            axis,
            kind,
            gains,
            self._family.gain_offset,
            part.fused,
            part.packed,
            part.either_order and kind == "weight",
        )

    def _check_claimed(self, table_name: str, name: str) -> None:
        """Stops at a tensor that is neither an expected writer nor a reader in the table."""
        owner = self.storage.owner(table_name)
        writes, reads = self._claims(owner)
        if not (writes or reads):  # it may have the name of a scale, and be none
            writes, reads = self._claims(table_name)
        match = writes or reads
        shown = name if name.isprintable() else ascii(name)
        if match is None:
            raise UnsupportedModel(
                f"The checkpoint has a tensor {shown} that is not known for model_type "
                f"{self.model_type!r}. It could write the residual stream, so nothing is edited. "
                f"If the model is a plain {self.model_type}, convert or re-download the "
                "checkpoint; if it is a variant, its tensors need an entry in "
                "abliterator/anatomy/architectures.yaml."
            )
        layer = match.groupdict().get("layer")
        if layer is not None and int(layer) >= self.n_layers:
            raise UnsupportedModel(
                f"The checkpoint has a tensor {shown}, but config.json says that there are "
                f"{self.n_layers} blocks (0 to {self.n_layers - 1}). Use a checkpoint whose config "
                "and weights belong together."
            )
        if writes and owner == table_name:
            raise UnsupportedModel(
                f"The checkpoint has a tensor {shown}, which would write the residual stream, but "
                f"config.json leaves no place for it ({self.n_experts} experts). Use a checkpoint "
                "whose config and weights belong together."
            )

    def _claims(self, name: str) -> list[re.Match[str] | None]:
        """How the table's names of writers, and those of readers, match a name."""
        return [
            next((m for pattern in patterns if (m := pattern.fullmatch(name))), None)
            for patterns in (self._family.writer_names, self._family.reader_names)
        ]

    def _check_present(self, expected: Collection[Writer], on_disk: Collection[str]) -> None:
        """Stops where writers, or gains after them, are not there; says how many of how many."""
        needed = {name: writer for writer in expected for name in (*writer.gains, writer.name)}
        missing = [name for name in needed if name not in on_disk]
        if not missing:
            return
        first = needed[missing[0]]
        alike = [name for name, w in needed.items() if w.component == first.component]
        present = sum(name in on_disk for name in alike)
        more = f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UnsupportedModel(
            f"The checkpoint has no tensor {missing[0]}{more}, which a {self.model_type} with "
            f"{self.n_layers} blocks needs: it writes the residual stream. Of the {len(alike)} "
            f"tensors of the component {first.component}, {present} are there. Use a complete "
            "checkpoint of the model."
        )

    def _check_shape(
        self, writer: Writer, on_disk: Mapping[str, str], shapes: Mapping[str, Shape]
    ) -> None:
        """Stops at a writer that does not write d_model numbers, or at gains of another shape."""
        for gain in writer.gains:
            if shapes[on_disk[gain]] != (self.d_model,):
                raise UnsupportedModel(
                    f"Tensor {on_disk[gain]} has shape {list(shapes[on_disk[gain]])}, expected "
                    f"[{self.d_model}]: the gains of a norm that follows what writes the residual "
                    "stream. Use a checkpoint whose config and weights belong together."
                )
        shape = shapes[on_disk[writer.name]]
        dimensions = (2 + writer.packed if writer.kind == "weight" else 1) + writer.fused
        if self.storage.packs(on_disk[writer.name]):
            return  # its layout says what shape the weight has
        if len(shape) != dimensions or shape[writer.axis] != self.d_model:
            raise UnsupportedModel(
                f"Tensor {on_disk[writer.name]} has shape {list(shape)}, expected {dimensions} "
                f"dimensions with {self.d_model} (the model's width in config.json) on axis "
                f"{writer.axis}, the one that writes the residual stream. The tensor may be packed "
                "by a quantiser: use an unquantised checkpoint of the model."
            )

    def _with_axis_by_length(
        self, writer: Writer, on_disk: Mapping[str, str], shapes: Shapes
    ) -> Writer:
        """The writer with the axis that is d_model long, inferred as the loader infers it."""
        name = on_disk[writer.name]
        if not writer.either_order or len(shapes[name]) < 2:
            return writer
        rows, columns = shapes[name][-2:]
        if rows == columns:
            raise UnsupportedModel(
                f"Tensor {name} is square ({list(shapes[name])}), and of a {self.model_type} "
                "transformers tells the order of its axes from their lengths alone: which side "
                "writes cannot be known. Use another model."
            )
        last = len(shapes[name]) - 1
        return replace(writer, axis=last if columns == self.d_model else last - 1)


def broad_component(component: str) -> str:
    """The component to inherit a strength from: "attention" if it mixes tokens, else "mlp"."""
    return "attention" if component in _MIXERS else "mlp"


def _slots(parts: Iterable[Part]) -> Iterable[list[Part]]:
    """Groups parts that are alternatives to each other."""
    slots: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        slots[part.one_of or part.tensor].append(part)
    return slots.values()
