"""Stacks: the subspace of k directions, by name of how they are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from abliterator.directions._estimators import Cleaning
from abliterator.directions._fit import (
    Directions,
    Subspace,
    per_layer,
    stack,
    within_layer,
)
from abliterator.directions._map import GRID, map_directions
from abliterator.directions._observations import Observations
from abliterator.errors import DirectionError
from abliterator.subspace import orthonormal_basis


@dataclass(frozen=True)
class Sources:
    """What a stack is made from.

    Attributes:
        observations: of one token position.
        directions: the estimate of every layer.
        cleaning: what was removed from it.
        grid: rows and columns of a self-organising map.
    """

    observations: Observations
    directions: Directions
    cleaning: Cleaning = field(default_factory=Cleaning)
    grid: tuple[int, int] = GRID


@dataclass(frozen=True)
class StackMethod:
    """A choice of the directions that are removed together.

    Attributes:
        paper: where it is from; "" for what follows from the formula of one direction.
        within: where all directions are of one layer: sources and that layer to the candidates
            [n, H] float64, in order of preference.
        needs_vectors: names of the `Observations.vectors` that it reads.
    """

    paper: str = ""
    within: Callable[[Sources, int], Tensor] | None = None
    needs_vectors: tuple[str, ...] = ()


def _components(sources: Sources, layer: int) -> Tensor:
    return within_layer(
        sources.directions.vectors[layer - 1],
        sources.observations.vectors["differences"][:, layer - 1],
    )


def _nodes(sources: Sources, layer: int) -> Tensor:
    return map_directions(sources.observations, layer, grid=sources.grid, cleaning=sources.cleaning)


STACKS: Mapping[str, StackMethod] = {
    "layers": StackMethod("Arditi et al. 2024, arXiv 2406.11717"),
    "per_layer": StackMethod(),
    "within_layer": StackMethod(within=_components, needs_vectors=("differences",)),
    "som": StackMethod("Piras et al. 2025, arXiv 2511.08379", _nodes, ("target",)),
}


def subspace_of(name: str, sources: Sources, *, layers: Sequence[int], k: int) -> Subspace:
    """The subspace of one of `STACKS`.

    Args:
        name: of the stack.
        sources: what it is made from.
        layers: residual layers, 1 .. L, in order of preference; a stack within one layer takes the
            first.
        k: directions; 1 for `per_layer`, whose blocks have one each.

    Raises:
        DirectionError: if directions have no length or depend on each other, or are fewer than k.
    """
    if name == "per_layer":
        return per_layer(sources.directions, layers)
    within = STACKS[name].within
    if within is None:
        return stack(sources.directions, layers[:k])
    return first_within(within(sources, layers[0]), layers[0], k)


def first_within(candidates: Tensor, layer: int, k: int) -> Subspace:
    """The subspace of the first k directions [n, H] of one layer.

    Raises:
        DirectionError: if there are fewer than k, or they depend on each other.
    """
    if k > len(candidates):
        raise DirectionError(
            f"There are {len(candidates)} independent directions at layer {layer}, and k is {k}. "
            "Give a smaller k, or more prompts."
        )
    names = [f"direction {i} of layer {layer}" for i in range(k)]
    return Subspace(orthonormal_basis(candidates[:k], names), (layer,))
