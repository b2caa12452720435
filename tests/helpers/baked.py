"""Bakes of the tiny models of `quantised`, and what is stored of them."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.recipe import Edit
from abliterator.record import TensorEdit
from abliterator.subspace import orthonormal_basis
from abliterator.verification import EDITS
from tests.helpers.quantised import D_MODEL


def basis(k):
    return orthonormal_basis(torch.randn(k, D_MODEL, generator=torch.Generator().manual_seed(3)))


def planned(folder, **settings):
    checkpoint = Checkpoint.open(folder)
    return checkpoint, plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit(**settings))


def baked(folder, out, *, k=1, **settings) -> tuple[TensorEdit, ...]:
    checkpoint, plan = planned(folder, **settings)
    edits = bake(checkpoint, plan, basis(k), out, made_from={"subspace_sha256": "0" * 64})
    report = out / EDITS
    report.parent.mkdir()
    report.write_text(json.dumps([edit.model_dump(mode="json") for edit in edits]))
    return edits


def stored(folder):
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def rms(values):
    return (sum(value**2 for value in values) / len(values)) ** 0.5
