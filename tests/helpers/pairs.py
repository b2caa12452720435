"""Checkpoints of tiny models whose modules have edits W' = W - s U Vᵀ W of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterator.anatomy import Anatomy, anatomy_of
from abliterator.bake import (
    EditPlan,
    bake,
    plan_edits,
    runtime_obstacle,
    runtime_sites,
    start_pairs,
)
from abliterator.checkpoint import Checkpoint
from abliterator.directions import save_published
from abliterator.files import write_text_atomic
from abliterator.pipeline.stages.bake import edits_json
from abliterator.recipe import Edit
from abliterator.record import TensorEdit
from abliterator.subspace import lengths_of, random_basis, with_lengths
from abliterator.verification import DIRECTIONS, EDITS


def planned(folder: Path, **settings: Any) -> tuple[Checkpoint, Anatomy, EditPlan]:
    """A plan with another strength for each module."""
    checkpoint = Checkpoint.open(folder)
    anatomy = anatomy_of(checkpoint.config)
    plan = plan_edits(checkpoint, anatomy, Edit(**settings))
    modules = dict.fromkeys(edit.writer.module for edit in plan.edits)
    strengths = {module: 0.5 + 0.1 * i for i, module in enumerate(modules)}
    return checkpoint, anatomy, plan.with_strengths(strengths)


def random_pairs(plan: EditPlan, checkpoint: Checkpoint, r: int = 2) -> Tensor:
    """Pairs away from the start, whose numbers float32 holds."""
    start = start_pairs(plan, checkpoint, random_basis(plan.d_model, r, seed=3))
    chance = torch.Generator().manual_seed(1)
    noise = torch.randn(start.shape, generator=chance, dtype=torch.float64) * start.abs().mean()
    return with_lengths(start + 0.4 * noise, lengths_of(start)).float().double()


def baked_with_pairs(
    base: Path, out: Path, pairs: Tensor | None = None, **settings: Any
) -> tuple[TensorEdit, ...]:
    """Bakes pairs, random ones unless they are given, with the files that others read."""
    checkpoint, anatomy, plan = planned(base, **settings)
    if pairs is None:
        pairs = random_pairs(plan, checkpoint)
    edits = bake(checkpoint, plan, pairs, out, made_from={"subspace_sha256": "0" * 64})
    write_text_atomic(out / EDITS, edits_json(edits))
    sites, tensors = runtime_sites(plan, checkpoint, pairs)
    save_published(
        out / DIRECTIONS,
        tensors={"directions": torch.zeros(anatomy.n_layers, anatomy.d_model), **tensors},
        sites=sites,
        metadata={"layers": "[1]", "blocks": anatomy.blocks, "model_type": anatomy.model_type},
        obstacle=runtime_obstacle(plan),
    )
    return edits
