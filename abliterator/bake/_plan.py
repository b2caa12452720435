"""Which tensors will be edited, told from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from abliterator.anatomy import Anatomy, Writer, broad_component
from abliterator.bake._experts import Chosen, Indices, experts_of_blocks, share_edited
from abliterator.checkpoint import Checkpoint, TensorInfo
from abliterator.errors import RecipeError, UnsupportedModel
from abliterator.formats import FORMATS, SCALE_SUFFIX, format_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EditSettings:
    """How writers are edited; the fields mean what they mean in a recipe's `edit`.

    The strength of a component is one number, or one for every block of the model.
    A component without a strength of its own has that of "attention" if it mixes tokens, else that
    of "mlp": experts are edited as the MLP is unless they are named.

    `experts` are the routed experts that are edited, in all blocks or by block (`_experts.Chosen`);
    None for all.
    """

    strength: Mapping[str, float | Sequence[float]] = field(
        default_factory=lambda: {"attention": 1.0, "mlp": 1.0}
    )
    norm: Literal["none", "column"] = "none"
    rounding: Literal["nearest", "compensated"] = "compensated"
    embeddings: bool = False
    biases: bool = True
    experts: Chosen | None = None


@dataclass(frozen=True)
class PlannedEdit:
    """One tensor that will be edited, where it lies, and how strongly.

    `scale` is the tensor of its block scales, for formats that have them, and `block` their size.
    `experts` are those that are edited of a tensor of several; None where it is edited whole.
    """

    writer: Writer
    info: TensorInfo
    strength: float
    scale: str | None = None
    block: tuple[int, int] = (1, 1)
    experts: Indices | None = None

    @property
    def edited_bytes(self) -> int:
        """Bytes of what is edited of it."""
        share = 1.0 if self.experts is None else len(self.experts) / self.info.shape[0]
        return round(share * self.info.nbytes)

    @property
    def packed(self) -> bool:
        """Whether two numbers share a byte (MXFP4)."""
        return self.writer.packed and self.writer.kind == "weight"


@dataclass(frozen=True)
class EditPlan:
    """Every tensor that will be edited, in no order that matters; nothing else is touched.

    `writers` are all that the checkpoint has, edited or not.
    """

    edits: tuple[PlannedEdit, ...]
    settings: EditSettings
    d_model: int
    n_layers: int
    writers: tuple[Writer, ...] = ()

    def with_strengths(self, strengths: Mapping[str, float]) -> EditPlan:
        """The same plan at other strengths, by module path of the writer; 0 leaves it out."""
        edits = (replace(edit, strength=strengths[edit.writer.module]) for edit in self.edits)
        return replace(self, edits=tuple(edit for edit in edits if edit.strength))

    def experts_of(self, module: str) -> Indices | None:
        """Which experts of a run-time module are edited; None for all of them, or no experts."""
        own = [edit for edit in self.edits if edit.writer.module == module]
        edited = {edit.writer.expert for edit in own} - {None}
        every = {w.expert for w in self.writers if w.module == module} - {None}
        if edited == every:  # none has a tensor of its own, or all of them are edited
            return own[0].experts
        return tuple(sorted(expert for expert in edited if expert is not None))

    @property
    def edited_bytes(self) -> int:
        """Bytes that will be written anew."""
        return sum(edit.edited_bytes for edit in self.edits)


def plan_edits(checkpoint: Checkpoint, anatomy: Anatomy, settings: EditSettings) -> EditPlan:
    """Which tensors will be edited, from headers alone; loads no weights and no torch.

    Raises:
        RecipeError: for strengths by block that are not one for every block, and for experts that
            are not there or have strength 0.
        UnsupportedModel: for a tensor the anatomy does not know or does not find, a storage format
            that cannot be edited, and embeddings that are tied to the output head or have no exact
            edit.
    """
    writers = anatomy.writers(checkpoint.shapes)
    if settings.embeddings:
        _require_editable_embeddings(writers, anatomy)
    for component, strength in settings.strength.items():
        if isinstance(strength, Sequence) and len(strength) != anatomy.n_layers:
            raise RecipeError(
                f"{len(strength)} strengths are given for `{component}`, and the model has "
                f"{anatomy.n_layers} blocks. Give one for every block, or one number."
            )
    asked = settings.experts
    chosen = experts_of_blocks(writers, checkpoint.shapes, asked) if asked is not None else None
    edits = []
    for writer in writers:
        strength = _strength_of(writer, settings)
        share = share_edited(writer, chosen)
        if strength == 0 or share == () or (writer.kind == "bias" and not settings.biases):
            continue
        edits.append(replace(_planned(writer, strength, checkpoint), experts=share))
        for gain in writer.gains:
            _require_plain(checkpoint.tensors[gain])
    if chosen is not None and not any(edit.writer.component == "expert" for edit in edits):
        raise RecipeError(
            "`edit.experts` chooses experts, and `edit.strength` leaves them alone. Give `expert` "
            "(or `mlp`) a strength."
        )
    return EditPlan(tuple(edits), settings, anatomy.d_model, anatomy.n_layers, writers)


def require_fit(basis: Tensor, plan: EditPlan) -> None:
    """Stops at a subspace that is not one for the planned model.

    Args:
        basis: Q [H, k], or [L, H, k] with one a block.
        plan: which writers are edited.

    Raises:
        UnsupportedModel: for another width or another number of blocks than the model's.
        RecipeError: where embeddings are edited, to which no block's subspace belongs.
    """
    width = basis.shape[-2]
    if width != plan.d_model:
        raise UnsupportedModel(
            f"The subspace has {width} dimensions, the model's residual stream {plan.d_model}: "
            f"it was made for another model."
        )
    if basis.ndim == 2:
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


def _strength_of(writer: Writer, settings: EditSettings) -> float:
    if writer.component == "embedding":
        return float(settings.embeddings)
    inherited = settings.strength.get(broad_component(writer.component), 0.0)
    strength = settings.strength.get(writer.component, inherited)
    return strength[writer.layer] if isinstance(strength, Sequence) else strength


def _require_editable_embeddings(writers: tuple[Writer, ...], anatomy: Anatomy) -> None:
    embeddings = [writer.name for writer in writers if writer.component == "embedding"]
    if not embeddings:
        raise UnsupportedModel(
            f"`edit.embeddings` has no exact form for a {anatomy.model_type}: a norm stands "
            "between the embedding and the residual stream. Leave `embeddings: false`."
        )
    if anatomy.tied_embeddings:
        raise UnsupportedModel(
            f"`edit.embeddings` would edit {embeddings[0]}, which is also the output head of "
            f"this model (tied): the head would change too. Leave `embeddings: false`."
        )


def _planned(writer: Writer, strength: float, checkpoint: Checkpoint) -> PlannedEdit:
    info = checkpoint.tensors[writer.name]
    if writer.packed and writer.kind == "weight":
        return _planned_packed(writer, strength, checkpoint)
    if not format_of(info.dtype, writer.name).scaled:
        return PlannedEdit(writer, info, strength)
    scale = writer.name + SCALE_SUFFIX
    block = _block_size(checkpoint.config)
    if block is None or scale not in checkpoint.tensors or len(info.shape) != 2:
        raise UnsupportedModel(
            f"Tensor {writer.name} is stored as {info.dtype} without the block scales "
            f"{scale} [rows / block, columns / block] and the weight_block_size in config.json "
            "that belong to this format. Use a checkpoint with both, or one in bfloat16."
        )
    blocks = tuple(-(-size // step) for size, step in zip(info.shape, block, strict=True))
    _require_plain(checkpoint.tensors[scale])
    if checkpoint.tensors[scale].shape != blocks:
        raise UnsupportedModel(
            f"Tensor {scale} has shape {list(checkpoint.tensors[scale].shape)}, expected "
            f"{list(blocks)}: one scale per block of {block[0]} x {block[1]}. Download the model "
            "again, or use its bfloat16 checkpoint."
        )
    return PlannedEdit(writer, info, strength, scale, block)


def _planned_packed(writer: Writer, strength: float, checkpoint: Checkpoint) -> PlannedEdit:
    info = checkpoint.tensors[writer.name]
    scale = writer.name.removesuffix("_blocks") + "_scales"
    found = checkpoint.tensors.get(scale)
    right = found is not None and (found.dtype, found.shape) == ("U8", info.shape[:-1])
    if not right or info.dtype != "U8" or info.shape[-1] != 16:
        raise UnsupportedModel(
            f"Tensor {writer.name} ({info.dtype}, {list(info.shape)}) is not stored as MXFP4 is: "
            f"U8 [experts, d_model, blocks, 16] beside {scale}, U8 [experts, d_model, blocks]. "
            "Download the model again, or use its bfloat16 checkpoint."
        )
    return PlannedEdit(writer, info, strength, scale)


def _block_size(config: Mapping[str, object]) -> tuple[int, int] | None:
    settings = config.get("quantization_config")
    block = settings.get("weight_block_size") if isinstance(settings, Mapping) else None
    if not isinstance(block, list) or len(block) != 2:
        return None
    rows, columns = block
    whole = type(rows) is int and type(columns) is int and rows > 0 and columns > 0
    return (rows, columns) if whole else None


def _require_plain(info: TensorInfo) -> None:
    """Stops at a gain or scale that is stored in a form which would need scales itself."""
    if info.dtype not in FORMATS or FORMATS[info.dtype].scaled:
        raise UnsupportedModel(
            f"Tensor {info.name}, on which an edit depends, is stored as {info.dtype}; expected "
            "float32, float16 or bfloat16. Use a checkpoint of the model in one of these formats."
        )
