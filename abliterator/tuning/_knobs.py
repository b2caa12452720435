"""What turns in a descent: a strength for each writer, and the directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from abliterator.bake import preview_edit
from abliterator.subspace import orthonormal_columns
from abliterator.tuning._types import Setting, Settings, Subject

STRONGEST = 1.3  # a little beyond removal (1); at 2 an edit would mirror what it should remove
STRENGTH_RATE = 0.25  # of Adam, on the logit of strength / STRONGEST
DIRECTION_RATE = 0.25  # of Adam, in typical coordinates of a unit vector (H ** -0.5)
SLOWEST = 0.1  # share of its rate that a leg ends with


class Knobs:
    """Strengths as logits, one a writer's module, and directions as the columns of a matrix.

    Where each block has a subspace of its own, there is a matrix for each.

    A strength starts half way to `STRONGEST`, where it can move both ways, unless it is not tuned.
    """

    def __init__(self, subject: Subject, basis: Tensor, settings: Settings) -> None:
        self._subject = subject
        planned = {edit.writer.module: edit.strength for edit in subject.plan.edits}
        device = subject.loaded.device
        self._modules = list(planned)
        self._fixed = None
        if not settings.strengths:
            self._fixed = torch.tensor(list(planned.values()), device=device)
        self._logits = nn.Parameter(torch.zeros(len(planned), device=device))
        self._columns = nn.Parameter(basis.to(device, torch.float32, copy=True))
        self._columns.requires_grad_(settings.directions)

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam, with a rate for each kind of knob."""
        tuned = [{"params": [self._logits], "lr": STRENGTH_RATE}]
        if self._fixed is not None:
            tuned = []
        if self._columns.requires_grad:
            rate = DIRECTION_RATE * self._columns.shape[-2] ** -0.5
            tuned.append({"params": [self._columns], "lr": rate})
        return torch.optim.Adam(tuned)

    @contextmanager
    def turned(self) -> Iterator[None]:
        """The model edited as the knobs stand; gradients flow to them."""
        strengths = dict(zip(self._modules, self._strengths(), strict=True))
        with preview_edit(self._subject.loaded, self._subject.plan, self._basis(), strengths):
            yield

    def setting(self) -> Setting:
        """As the knobs stand, without gradients."""
        basis = orthonormal_columns(self._columns.detach())
        strengths = self._strengths().detach().tolist()
        return Setting(basis, dict(zip(self._modules, strengths, strict=True))).scaled(1)

    def _strengths(self) -> Tensor:
        return STRONGEST * self._logits.sigmoid() if self._fixed is None else self._fixed

    def _basis(self) -> Tensor:
        if not self._columns.requires_grad:
            return self._columns
        q, r = torch.linalg.qr(self._columns)
        basis: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        return basis


def mean_of(settings: Sequence[Setting]) -> Setting:
    """The mean of edits that lie near to one another."""
    basis = orthonormal_columns(torch.stack([s.basis for s in settings]).mean(dim=0))
    modules = settings[0].strengths
    mean = {m: sum(s.strengths[m] for s in settings) / len(settings) for m in modules}
    return Setting(basis, mean).scaled(1)


def slow_down(optimiser: torch.optim.Optimizer, share: float) -> None:
    """Sets the rates to what they are when `share` of a leg is done: a cosine down to `SLOWEST`."""
    factor = SLOWEST + (1 - SLOWEST) * (1 + math.cos(math.pi * share)) / 2
    for group in optimiser.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
