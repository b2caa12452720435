"""From moments to directions, and from directions to the subspace that is removed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from abliterator.subspace import DEPENDENT_BELOW, MomentSet, orthonormal_basis


@dataclass(frozen=True)
class Directions:
    """One direction per residual layer, not normalised.

    Attributes:
        vectors: [L, H] float64; row l - 1 belongs to layer l.
    """

    vectors: Tensor


# A token of the prompt: counted from its end, or named.
Position: TypeAlias = int | str


class Place(NamedTuple):
    """The layer and token position of a direction.

    Attributes:
        layer: residual layer, 1 .. L.
        position: token of the prompt, from its end; or the name of a token.
    """

    layer: int
    position: Position = -1

    def __str__(self) -> str:
        """The layer, and the position where it is not the last token."""
        return f"{self.layer}" if self.position == -1 else f"{self.layer} at {self.position}"


class Node(NamedTuple):
    """A direction of a layer that has several: a node of its self-organising map.

    Attributes:
        layer: residual layer, 1 .. L.
        position: as that of a `Place`.
        node: its index among the directions of the layer, from 0.
    """

    layer: int
    position: Position
    node: int

    def __str__(self) -> str:
        """The node and its place."""
        return f"{Place(self.layer, self.position)}, node {self.node}"


AnyPlace: TypeAlias = Place | Node


def nodes_of(places: Sequence[AnyPlace]) -> tuple[int, ...]:
    """The index of each node; none where the places are not nodes."""
    return tuple(place.node for place in places if isinstance(place, Node))


@dataclass(frozen=True)
class Subspace:
    """The rank-k subspace that an edit removes.

    Attributes:
        basis: Q [H, k] float64, orthonormal columns; or [L, H, k], of which Q[i] is removed from
            what block i (0 .. L - 1) writes; or pairs [M, 2, H, r], U and V of each module that
            writes, which remove no subspace.
        layers: the residual layers whose directions it spans; empty where that is not known.
    """

    basis: Tensor
    layers: tuple[int, ...]


def fit_directions(
    target: MomentSet, contrast: MomentSet, *, remove_mean_of: MomentSet | None = None
) -> Directions:
    """r[l] = mean(target) - mean(contrast) at every layer (Arditi et al. 2024, eq. 2).

    Args:
        target: moments of the prompts on which the behaviour shows.
        contrast: moments of prompts as like them as possible but for the behaviour.
        remove_mean_of: where given, the component of each direction along this set's mean at the
            same layer is removed ("projected" abliteration, Lai 2025).
    """
    vectors = target.mean - contrast.mean
    if remove_mean_of is not None:
        vectors = without_mean(vectors, remove_mean_of.mean)
    return Directions(vectors)


def without_mean(vectors: Tensor, mean: Tensor) -> Tensor:
    """Vectors [L, H] without their components along the means [L, H], or [1, H] for all rows."""
    unit = torch.nn.functional.normalize(mean, dim=1)
    return vectors - (vectors * unit).sum(dim=1, keepdim=True) * unit


def fit_shuffled(
    target: tuple[MomentSet, MomentSet], contrast: tuple[MomentSet, MomentSet]
) -> Directions:
    """Directions of shuffled labels: a control that separates prompts, but not by the behaviour.

    Half of the prompts of each kind against the other half of each kind: the difference between the
    kinds cancels.

    Args:
        target: moments of all prompts, and of a random half of them.
        contrast: the same.
    """
    differences = [
        (half.mean - all_.mean) * all_.n / (all_.n - half.n) for all_, half in (target, contrast)
    ]
    return Directions((differences[0] + differences[1]) / 2)


def stack(directions: Directions, layers: Sequence[int]) -> Subspace:
    """`stack_at` of layers at one position."""
    return stack_at({-1: directions}, [Place(layer) for layer in layers])


def position_order(position: Position) -> tuple[int, str]:
    """A key that sorts positions: -1, the last token, first, then those before it, then names."""
    return (-position, "") if isinstance(position, int) else (sys.maxsize, position)


def stack_at(directions: Mapping[Position, Directions], places: Sequence[Place]) -> Subspace:
    """Stacks the directions of `places`, in order of preference, into an orthonormal basis.

    Args:
        directions: by position.
        places: layers 1 .. L at positions of `directions`.

    Raises:
        DirectionError: if one has no length or depends on those before it; it names the place.
    """
    vectors = torch.stack([directions[p.position].vectors[p.layer - 1] for p in places])
    basis = orthonormal_basis(vectors, [f"layer {place}" for place in places])
    return Subspace(basis, tuple(place.layer for place in places))


def per_layer(directions: Directions, layers: Sequence[int]) -> Subspace:
    """A subspace for each block: the direction of its own layer, or of the nearest of `layers`.

    Args:
        directions: of L layers.
        layers: those whose directions are used; layer i + 1 is the output of block i, and of two
            equally near the lower one is used.

    Returns:
        A basis [L, H, 1].

    Raises:
        DirectionError: if a direction has no length; it names the layer.
    """
    by_layer = {layer: stack(directions, [layer]).basis for layer in layers}
    n_layers = len(directions.vectors)
    nearest = [
        min(layers, key=lambda layer: (abs(layer - block - 1), layer)) for block in range(n_layers)
    ]
    return Subspace(torch.stack([by_layer[layer] for layer in nearest]), tuple(layers))


def within_layer(direction: Tensor, differences: Tensor) -> Tensor:
    """A direction, then the principal components of the paired differences orthogonal to it.

    Args:
        direction: r [H], the mean of the differences, of any length.
        differences: [N, H], target - contrast of each pair at one layer.

    Returns:
        [n, H] float64: r, then unit vectors, those along which the pairs differ most first; as many
        as the differences have.
    """
    unit = torch.nn.functional.normalize(direction.double(), dim=0)
    orthogonal = differences.double()
    orthogonal = orthogonal - (orthogonal @ unit)[:, None] * unit
    _, lengths, components = torch.linalg.svd(orthogonal, full_matrices=False)
    # the rounding error of a float32 zero is no direction
    is_nonzero = lengths > DEPENDENT_BELOW * differences.double().norm()
    return torch.cat([direction.double()[None], components[is_nonzero]])
