"""What a recipe will do, told from config.json and safetensors headers alone.

No weights are read, and torch is not loaded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.anatomy import Anatomy, anatomy_of
from abliterator.bake import PANEL_ELEMENTS, EditPlan, EditSettings, plan_edits
from abliterator.checkpoint import Checkpoint, carried_files, free_bytes
from abliterator.errors import OutputError, RecipeError
from abliterator.recipe import Edit, Recipe

if TYPE_CHECKING:
    from abliterator.source import ModelSource

# Left free beside the checkpoint: the work folder, and room for the file system to breathe.
DISK_RESERVE = 64 << 20


@dataclass(frozen=True)
class Plan:
    """A checkpoint understood, and what is going to be done to it.

    `layers` and `k` are those of a recipe; without one they are empty and 0.
    """

    source: ModelSource
    checkpoint: Checkpoint
    anatomy: Anatomy
    edits: EditPlan
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    free_bytes: int
    layers: tuple[int, ...] = ()
    k: int = 0

    @property
    def output_bytes(self) -> int:
        """Size of the edited checkpoint's files."""
        folder = self.checkpoint.folder
        return self.checkpoint.total_bytes + sum((folder / n).stat().st_size for n in self.carried)

    @property
    def bake_memory(self) -> int:
        """Bytes that baking needs at most: the largest edited tensor and a few panels of it."""
        largest = max((edit.info.nbytes for edit in self.edits.edits), default=0)
        return largest + 8 * PANEL_ELEMENTS * 4

    def summary(self) -> dict[str, Any]:
        """The plan as plain values, for `--json` and for people."""
        planned = Counter(edit.writer.component for edit in self.edits.edits)
        return {
            "model": self.source.id,
            "revision": self.source.revision,
            "model_type": self.anatomy.model_type,
            "n_layers": self.anatomy.n_layers,
            "d_model": self.anatomy.d_model,
            "tied_embeddings": self.anatomy.tied_embeddings,
            "layers": list(self.layers[: self.k]),
            "k": self.k,
            "edit": asdict(self.edits.settings),
            "edited_tensors": dict(planned),
            "untouched_tensors": len(self.checkpoint.tensors) - len(self.edits.edits),
            "bytes": {
                "read": self.checkpoint.total_bytes,
                "edited": self.edits.edited_bytes,
                "written": self.output_bytes,
                "free": self.free_bytes,
            },
            "bake_memory": self.bake_memory,
            "files": {
                "weights": list(self.checkpoint.weight_files),
                "carried": list(self.carried),
                "left_out": list(self.left_out),
            },
        }


def make_plan(source: ModelSource, edit: Edit, out: Path) -> Plan:
    """Opens the checkpoint and classifies every tensor.

    Raises:
        CheckpointError: for a damaged or incomplete folder.
        UnsupportedModel: for an architecture, tensor or format that is not known.
    """
    checkpoint = Checkpoint.open(source.folder)
    anatomy = anatomy_of(checkpoint.config)
    carried, left_out = carried_files(source.folder)
    return Plan(
        source,
        checkpoint,
        anatomy,
        plan_edits(checkpoint, anatomy, edit_settings(edit)),
        tuple(carried),
        tuple(left_out),
        free_bytes(out),
    )


def edit_settings(edit: Edit) -> EditSettings:
    """The recipe's section as the plain arguments that `bake` takes."""
    return EditSettings(
        strength={str(component): s for component, s in edit.strength.items()},
        norm=edit.norm,
        rounding=edit.rounding,
        embeddings=edit.embeddings,
        biases=edit.biases,
    )


def require_room(plan: Plan, out: Path) -> None:
    """Raises OutputError if the disk of `out` cannot take the edited checkpoint."""
    needed = plan.output_bytes + DISK_RESERVE
    if plan.free_bytes < needed:
        raise OutputError(
            f"The edited checkpoint needs {needed / 1e9:.2f} GB, and the disk of {out} has "
            f"{plan.free_bytes / 1e9:.2f} GB free. Make room, or choose another --out."
        )


def require_layers(recipe: Recipe, anatomy: Anatomy) -> tuple[tuple[int, ...], int]:
    """The layers and k of a recipe, which the model must have.

    Raises:
        RecipeError: for layers the model does not have, and for what only a sweep could tell.
    """
    if recipe.layers == "sweep" or recipe.k == "auto":
        raise RecipeError(
            "`layers: sweep` and `k: auto` need the selection stage, which this version does not "
            "have yet. Give layers and k, for example `--set layers=[12] --set k=1`: layers around "
            "the middle of the model are where to begin."
        )
    beyond = [layer for layer in recipe.layers if layer > anatomy.n_layers]
    if beyond:
        raise RecipeError(
            f"`layers` names {', '.join(map(str, beyond))}, but the model has layers 1 to "
            f"{anatomy.n_layers} (layer l is the residual stream that enters block l)."
        )
    return recipe.layers, recipe.k
