"""The trainable parameters of an edit: a strength for each writer, and the directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from abliterator.bake import preview_edit
from abliterator.subspace import (
    basis_of_block,
    is_by_writer,
    lengths_of,
    orthonormal_columns,
    pair_distances,
    with_lengths,
)
from abliterator.tuning._types import TunedEdit, TuningContext

STRONGEST = 1.3  # a little beyond removal (1); at 2 an edit would mirror what it should remove
STRENGTH_RATE = 0.25  # of Adam, on the logit of strength / STRONGEST
DIRECTION_RATE = 0.25  # of Adam, in units of a unit vector's typical coordinate (H ** -0.5)
PAIR_RATE = 0.125  # the same for U and V: both move U Vᵀ, and at 0.25 the first steps overshoot
SLOWEST = 0.1  # share of its rate that a phase ends with


class EditParameters:
    """Strengths as logits, one a writer's module, and directions as the columns of a matrix.

    Where each block has a subspace of its own, there is a matrix for each. Where each module has U
    and V, these are two: whatever a step makes of them, U gets the length (Frobenius) of its start
    and V's columns length 1, so that every edit is finite and bounded.

    A strength starts half way to `STRONGEST`, where it can move both ways, unless it is not tuned.
    """

    def __init__(self, context: TuningContext, basis: Tensor) -> None:
        self._context = context
        planned = {edit.writer.module: edit.strength for edit in context.plan.edits}
        device = context.loaded.device
        self._modules = list(planned)
        self._fixed = None
        if not context.strengths:
            self._fixed = torch.tensor(list(planned.values()), device=device)
        self._logits = nn.Parameter(torch.zeros(len(planned), device=device))
        self._start = basis.to(device, torch.float32, copy=True)
        self._lengths = lengths_of(self._start) if is_by_writer(basis) else None
        self._edited: list[int] = []
        if self._lengths is not None:  # pairs of other modules must stay at the start
            self._edited = sorted({context.plan.pair_of[module] for module in planned})
        self._columns = nn.Parameter(_comparable(self._start, self._lengths))
        self._columns.requires_grad_(context.directions)

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam, with a rate for strengths and one for directions."""
        tuned = [{"params": [self._logits], "lr": STRENGTH_RATE}]
        if self._fixed is not None:
            tuned = []
        if self._columns.requires_grad:
            rate = DIRECTION_RATE if self._lengths is None else PAIR_RATE
            rate *= self._columns.shape[-2] ** -0.5
            tuned.append({"params": [self._columns], "lr": rate})
        return torch.optim.Adam(tuned)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model under the edit with these parameters; gradients flow to them."""
        strengths = dict(zip(self._modules, self._strengths(), strict=True))
        with preview_edit(self._context.loaded, self._context.plan, self._basis(), strengths):
            yield

    def direction(self, layer: int) -> Tensor:
        """[H] first direction, of length 1, that is removed from residual layer `layer`."""
        return basis_of_block(self._basis(), layer - 1)[:, 0]

    def edit(self) -> TunedEdit:
        """The edit with these parameters, without gradients."""
        basis = _sound(self._columns.detach(), self._lengths)
        strengths = self._strengths().detach().tolist()
        return TunedEdit(basis, dict(zip(self._modules, strengths, strict=True))).scaled(1)

    def ridge(self) -> Tensor:
        """The mean squared distance of U Vᵀ from its start, relative to it; 0 with a subspace."""
        if self._lengths is None:
            return torch.zeros((), device=self._columns.device)
        return pair_distances(self._basis()[self._edited], self._start[self._edited]).mean()

    def values(self) -> dict[str, Any]:
        """The parameters as plain numbers, without loss."""
        return {"logits": self._logits.tolist(), "columns": self._columns.tolist()}

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Sets the parameters to those of `values`."""
        for parameter, numbers in (
            (self._logits, values["logits"]),
            (self._columns, values["columns"]),
        ):
            parameter.data.copy_(torch.tensor(numbers, dtype=torch.float32))

    def _strengths(self) -> Tensor:
        return STRONGEST * self._logits.sigmoid() if self._fixed is None else self._fixed

    def _basis(self) -> Tensor:
        if self._lengths is not None:
            return with_lengths(self._columns, self._lengths)
        if not self._columns.requires_grad:
            return self._columns
        q, r = torch.linalg.qr(self._columns.cpu())  # which not every device has
        basis: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        return basis


def mean_of(edits: Sequence[TunedEdit]) -> TunedEdit:
    """The mean of edits that are close to one another."""
    mean_basis = torch.stack([e.basis for e in edits]).mean(dim=0)
    lengths = lengths_of(edits[0].basis) if is_by_writer(mean_basis) else None
    basis = _sound(mean_basis, lengths)
    modules = edits[0].strengths
    mean = {m: sum(e.strengths[m] for e in edits) / len(edits) for m in modules}
    return TunedEdit(basis, mean).scaled(1)


def _comparable(basis: Tensor, lengths: Tensor | None) -> Tensor:
    """Columns that Adam's one rate moves alike: those of U at about length 1, as V's are."""
    if lengths is None:
        return basis.clone()
    unit = basis.clone()
    unit[:, 0] *= basis.shape[-1] ** 0.5 / lengths[:, None, None]
    return unit


def _sound(columns: Tensor, lengths: Tensor | None) -> Tensor:
    """The basis of such columns in float64, as it is baked.

    Pairs are rounded to float32, in which other programs read them.
    """
    if lengths is None:
        return orthonormal_columns(columns)
    return with_lengths(columns.cpu().double(), lengths.cpu().double()).float().double()


def slow_down(optimiser: torch.optim.Optimizer, share: float) -> None:
    """Sets the learning rates at `share` of a phase: a cosine down to `SLOWEST`."""
    factor = SLOWEST + (1 - SLOWEST) * (1 + math.cos(math.pi * share)) / 2
    for group in optimiser.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
