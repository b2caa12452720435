"""Plans which tensors are edited, and at what strengths, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from abliterator.anatomy import Anatomy, Writer, broad_component
from abliterator.bake._experts import Indices, experts_of_blocks, share_edited
from abliterator.checkpoint import DTYPE_BITS, Checkpoint, TensorInfo
from abliterator.errors import RecipeError, UnsupportedModel
from abliterator.files import damaged
from abliterator.formats import FORMATS, Dequantized, Layout, PackedLayout, Storage, preferred
from abliterator.recipe import Edit

if TYPE_CHECKING:
    from torch import Tensor

Quantized = Literal["auto", "keep", "dequantize"]
Strengths = Mapping[str, float | tuple[float, ...]]


@dataclass(frozen=True)
class PlannedEdit:
    """One tensor that will be edited, its position in the file, and its strength.

    `layout` is how it is stored, `stored` how it will be: the same, or plain numbers. `experts` are
    those that are edited of a tensor of several; None where it is edited whole.
    """

    writer: Writer
    info: TensorInfo
    strength: float
    layout: Layout
    stored: Layout
    experts: Indices | None = None

    @property
    def dequantizes(self) -> bool:
        """Whether a quantised tensor is written as plain numbers."""
        return self.stored is not self.layout

    @property
    def edited_bytes(self) -> int:
        """Bytes of its edited part, as it is stored afterwards."""
        share = 1.0 if self.experts is None else len(self.experts) / self.info.shape[0]
        return round(share * nbytes_of(self.stored))


@dataclass(frozen=True)
class EditPlan:
    """Every tensor that will be edited, in any order; no other tensor is.

    `writers` are all that the checkpoint has, edited or not.
    """

    edits: tuple[PlannedEdit, ...]
    settings: Edit
    d_model: int
    n_layers: int
    writers: tuple[Writer, ...] = ()
    storage: Storage = field(default_factory=Storage)

    def dequantized(self, checkpoint: Checkpoint) -> Dequantized:
        """Changes to headers and config where tensors are written as plain numbers."""
        names = [edit.info.name for edit in self.edits if edit.dequantizes]
        return self.storage.dequantized(checkpoint.tensors, names)

    def stored_as(self, quantized: Quantized) -> EditPlan:
        """The same plan with another choice of `quantized`."""
        edits = (replace(edit, stored=_stored(edit.layout, quantized)) for edit in self.edits)
        settings = self.settings.model_copy(update={"quantized": quantized})
        return replace(self, edits=tuple(edits), settings=settings)

    def added_bytes(self, checkpoint: Checkpoint) -> int:
        """Number of bytes by which the edited checkpoint's tensors exceed the base's."""
        dequantized, tensors = self.dequantized(checkpoint), checkpoint.tensors
        dense = sum(nbytes_of(layout) for layout in dequantized.dense.values())
        return dense - sum(
            tensors[name].nbytes for name in (*dequantized.layouts, *dequantized.dropped)
        )

    def largest_bytes(self, checkpoint: Checkpoint) -> int:
        """Largest bytes of one tensor in memory during baking: before the edit, and dequantized."""
        dense = self.dequantized(checkpoint).dense
        sizes = [edit.info.nbytes for edit in self.edits if edit.info.name not in dense]
        sizes += [checkpoint.tensors[name].nbytes + nbytes_of(new) for name, new in dense.items()]
        return max(sizes, default=0)

    def with_strengths(self, strengths: Mapping[str, float]) -> EditPlan:
        """The same plan at other strengths, by module path of the writer; 0 leaves it out."""
        edits = (replace(edit, strength=strengths[edit.writer.module]) for edit in self.edits)
        return replace(self, edits=tuple(edit for edit in edits if edit.strength))

    def experts_of(self, module: str) -> Indices | None:
        """Which experts of a run-time module are edited; None if all that it adds up is edited."""
        of_module = [edit for edit in self.edits if edit.writer.module == module]
        edited = {edit.writer.expert for edit in of_module} - {None}
        every = {w.expert for w in self.writers if w.module == module} - {None}
        first = of_module[0]
        if first.writer.adds_copies and first.writer.fused and first.experts is None:
            return tuple(range(first.info.shape[0]))
        if edited == every and not (first.writer.adds_copies and edited):
            return first.experts  # none has a tensor of its own, or all of them are edited
        return tuple(sorted(expert for expert in edited if expert is not None))

    @cached_property
    def pair_of(self) -> dict[str, int]:
        """Which of M pairs (U, V) is that of each module that writes, edited or not, by its path.

        Experts that are modules of their own share their block's.
        """
        groups: dict[object, int] = {}
        places = {}
        for writer in self.writers:
            of_block = (writer.layer, writer.component)
            group = of_block if writer.component == "expert" else writer.module
            places[writer.module] = groups.setdefault(group, len(groups))
        return places

    @property
    def edited_bytes(self) -> int:
        """Bytes of all edited parts, as they are stored afterwards."""
        return sum(edit.edited_bytes for edit in self.edits)


def plan_edits(checkpoint: Checkpoint, anatomy: Anatomy, settings: Edit) -> EditPlan:
    """Plans the edit of a checkpoint from its headers; loads no weights and no torch.

    Args:
        checkpoint: the base.
        anatomy: of its architecture.
        settings: how writers are edited: the recipe's `edit`.

    Raises:
        RecipeError: for strengths and experts of blocks that the model does not have, for
            experts that are not there or have strength 0, and for `partial` where nothing remains.
        UnsupportedModel: for a tensor the anatomy does not know or does not find, a storage format
            that cannot be edited, embeddings that are tied to the output head or have no exact
            edit, and a model that can be edited in part only where the settings do not say so.
    """
    _require_extent(anatomy, partial=settings.partial)
    writers = anatomy.writers(checkpoint.shapes)
    if settings.embeddings:
        _require_editable_embeddings(writers, anatomy)
    strengths = settings.strengths_in(anatomy.n_layers)
    experts = settings.experts_in(anatomy.n_layers)
    chosen = None
    if experts is not None:
        chosen = experts_of_blocks(writers, checkpoint.shapes, experts)
    edits = []
    for writer in writers:
        strength = _strength_of(writer, strengths, embeddings=settings.embeddings)
        share = share_edited(writer, chosen)
        if strength == 0 or share == () or (writer.kind == "bias" and not settings.biases):
            continue
        layout = anatomy.storage.layout(writer.name, checkpoint.tensors)
        _require_matrix(writer, layout, anatomy.d_model)
        info = checkpoint.tensors[writer.name]
        stored = _stored(layout, settings.quantized)
        edits.append(PlannedEdit(writer, info, strength, layout, stored, share))
        for gain in writer.gains:
            _require_plain(checkpoint.tensors[gain])
    if chosen is not None and not any(edit.writer.component == "expert" for edit in edits):
        raise RecipeError(
            "`edit.experts` chooses experts, and `edit.strength` leaves them alone. Give `expert` "
            "(or `mlp`) a strength."
        )
    return EditPlan(
        tuple(edits), settings, anatomy.d_model, anatomy.n_layers, writers, anatomy.storage
    )


def require_fit(basis: Tensor, plan: EditPlan) -> None:
    """Checks that a subspace fits the planned model.

    Args:
        basis: Q [H, k], or [L, H, k] with one a block, or pairs [M, 2, H, r].
        plan: which writers are edited.

    Raises:
        UnsupportedModel: for another width, or another number of blocks or of modules than the
            model's.
        RecipeError: where embeddings are edited, to which no block's subspace belongs, and for
            column norms kept under pairs.
    """
    width = basis.shape[-2]
    if width != plan.d_model:
        raise UnsupportedModel(
            f"The subspace has {width} dimensions, the model's residual stream {plan.d_model}: "
            f"it was made for another model."
        )
    if basis.ndim == 2:
        return
    if basis.ndim == 4:
        _require_pairs(basis, plan)
        return
    if len(basis) != plan.n_layers:
        raise UnsupportedModel(
            f"There is a subspace for each of {len(basis)} blocks, and the model has "
            f"{plan.n_layers}. Give one for every block (what block i writes loses the i-th), or "
            "one for all, [d_model, k]."
        )
    outside = next((e.writer.name for e in plan.edits if e.writer.layer < 0), None)
    if outside is not None:
        raise RecipeError(
            f"`edit.embeddings` would edit {outside}, which belongs to no block, and each block "
            "has a subspace of its own. Leave `embeddings: false`, or give one subspace for all, "
            "[d_model, k]."
        )


def _require_extent(anatomy: Anatomy, *, partial: bool) -> None:
    """Checks that the settings ask for a partial edit exactly where no other is possible."""
    if anatomy.partial and not partial:
        raise UnsupportedModel(
            f"A {anatomy.model_type} can be edited in part only: {anatomy.partial}. What its "
            "writers write can be edited exactly, and what these copies carry stays in the stream. "
            "Set `edit.partial: true` for that edit, or use a model of another type."
        )
    if partial and not anatomy.partial:
        raise RecipeError(
            f"`edit.partial: true` is for models of which a part of the edit cannot be made; of a "
            f"{anatomy.model_type} all of it can. Leave `edit.partial` out."
        )


def _require_pairs(pairs: Tensor, plan: EditPlan) -> None:
    n_modules = len({*plan.pair_of.values()})
    if len(pairs) != n_modules or pairs.shape[1] != 2:
        raise UnsupportedModel(
            f"There are pairs (U, V) of shape {list(pairs.shape)}, and the model has {n_modules} "
            f"modules that write: [{n_modules}, 2, {plan.d_model}, r] was expected. They were made "
            "for another model."
        )
    if plan.settings.norm != "none":
        raise RecipeError(
            f"`edit.norm: {plan.settings.norm}` scales columns, so that W' is no W - s U Vᵀ W. "
            "Leave `norm: none` where each writer has an edit of its own."
        )


def _strength_of(writer: Writer, strengths: Strengths, *, embeddings: bool) -> float:
    if writer.component == "embedding":
        return float(embeddings)
    inherited = strengths.get(broad_component(writer.component), 0.0)
    strength = strengths.get(writer.component, inherited)
    return strength[writer.layer] if isinstance(strength, tuple) else strength


def _require_editable_embeddings(writers: tuple[Writer, ...], anatomy: Anatomy) -> None:
    embeddings = [writer.name for writer in writers if writer.component == "embedding"]
    if not embeddings:
        raise UnsupportedModel(
            f"`edit.embeddings` has no exact form for a {anatomy.model_type}: a norm or another "
            "map stands between the embedding and the residual stream. Leave `embeddings: false`."
        )
    if anatomy.tied_embeddings:
        raise UnsupportedModel(
            f"`edit.embeddings` would edit {embeddings[0]}, which is also the output head of "
            f"this model (tied): the head would change too. Leave `embeddings: false`."
        )


def require_sound_scales(checkpoint: Checkpoint, plan: EditPlan) -> None:
    """Checks what the edited tensors' numbers are read with, before anything is written.

    Raises:
        CheckpointError: for scales that are no numbers, zero points and groups out of range, and a
            stated shape that is not that of the numbers; the tensor is named.
    """
    layouts = {edit.info.name: edit.layout for edit in plan.edits}
    for name, layout in {**layouts, **plan.dequantized(checkpoint).layouts}.items():
        fault = layout.fault(layout.scales_from(checkpoint.read))
        if fault is not None:
            raise damaged(checkpoint.folder / checkpoint.tensors[name].file, fault)


def _require_matrix(writer: Writer, layout: Layout, d_model: int) -> None:
    """Checks that a weight whose numbers are packed is a matrix that writes d_model numbers."""
    if not isinstance(layout, PackedLayout):
        return
    if writer.axis != 0 or writer.fused or layout.plain_shape[0] != d_model:
        raise UnsupportedModel(
            f"Tensor {layout.name} holds packed numbers of a matrix {list(layout.plain_shape)}; "
            f"one of [{d_model}, in] was expected, d_model being the model's width in config.json. "
            "Edit the model that it was made from in bfloat16."
        )


def nbytes_of(layout: Layout) -> int:
    """Bytes of a tensor in this layout, without its scales."""
    return math.prod(layout.shape) * DTYPE_BITS[layout.dtype] // 8


def _stored(layout: Layout, quantized: Quantized) -> Layout:
    method = preferred(layout.kind) if quantized == "auto" else quantized
    return layout.dense if layout.quantized and method == "dequantize" else layout


def _require_plain(info: TensorInfo) -> None:
    """Checks that a norm's gain is stored without scales."""
    if info.dtype not in FORMATS:
        raise UnsupportedModel(
            f"Tensor {info.name}, on which an edit depends, is stored as {info.dtype}; expected "
            "float32, float16 or bfloat16. Use a checkpoint of the model in one of these formats."
        )
