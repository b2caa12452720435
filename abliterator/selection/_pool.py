"""The candidate directions of a selection, and their stacks of k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterator.directions import (
    AnyPlace,
    Directions,
    Node,
    Place,
    Position,
    Subspace,
    first_within,
    stack_at,
    within_layer,
)
from abliterator.errors import DirectionError
from abliterator.subspace import orthonormal_basis


@dataclass(frozen=True)
class Pool:
    """Candidate places, and the directions there.

    Attributes:
        places: the candidates; where nothing is swept, in order of preference. Nodes are stacked
            with each other, places with other layers.
        directions: by position.
        shuffled: the same from shuffled labels, one mapping a shuffle: controls.
        differences: [N, L, H] by position, target - contrast of each pair. Where they are given, a
            stack is of the first place alone: its direction, then principal components of them.
        nodes: [n, H] by place, the directions of its self-organising map in order of preference.
            Where they are given, a stack is of the first place alone too: the first k of them.
    """

    places: Sequence[AnyPlace]
    directions: Mapping[Position, Directions]
    shuffled: Sequence[Mapping[Position, Directions]] = ()
    differences: Mapping[Position, Tensor] = field(default_factory=dict)
    nodes: Mapping[Place, Tensor] = field(default_factory=dict)

    @property
    def of_one_place(self) -> bool:
        """Whether all directions of a stack are those of its first place."""
        return bool(self.differences or self.nodes) and not isinstance(self.places[0], Node)

    @property
    def unit(self) -> str:
        """What a stack is of, in the plural."""
        if self.of_one_place:
            return "directions of one layer"
        return "nodes" if self.nodes else "layers"

    def direction(self, place: AnyPlace) -> Tensor:
        """The direction r [H] of a place, as extracted."""
        if isinstance(place, Node):
            return self.nodes[Place(place.layer, place.position)][place.node]
        return self.directions[place.position].vectors[place.layer - 1]

    def stack(self, order: Sequence[AnyPlace], k: int) -> Subspace:
        """The subspace of k directions, `order` being that of preference.

        Raises:
            DirectionError: for dependent directions, and where pairs differ along fewer than k.
        """
        if not self.of_one_place:
            return self._stack_of(order[:k])
        vectors, first = self._directions_within(order), order[0]
        if self.nodes:
            return first_within(vectors, first.layer, k)
        if k > len(vectors):
            raise DirectionError(
                f"The pairs differ along {len(vectors)} directions at layer {first}, and k is {k}. "
                f"Give a smaller k, or more pairs."
            )
        names = [f"layer {first}", *(f"component {i} of layer {first}" for i in range(1, k))]
        return Subspace(orthonormal_basis(vectors[:k], names), (first.layer,))

    def _stack_of(self, order: Sequence[AnyPlace]) -> Subspace:
        """The subspace of all candidates in `order`."""
        if places := [place for place in order if isinstance(place, Place)]:
            return stack_at(self.directions, places)
        vectors = torch.stack([self.direction(node) for node in order])
        basis = orthonormal_basis(vectors, [f"layer {node}" for node in order])
        return Subspace(basis, (order[0].layer,))

    def shuffled_stacks(self, order: Sequence[AnyPlace], k: int, draws: int) -> list[Tensor]:
        """Q [H, k] each of as many directions from shuffled labels, up to `draws` of them.

        Of the same places, one shuffle each; within a layer, of k shuffles each.
        """
        if not (self.differences or self.nodes):
            places = [place for place in order[:k] if isinstance(place, Place)]
            return [stack_at(shuffle, places).basis for shuffle in self.shuffled[:draws]]
        first = order[0]
        vectors = [shuffle[first.position].vectors[first.layer - 1] for shuffle in self.shuffled]
        stacks = range(0, min(draws * k, len(vectors) - k + 1), k)
        return [orthonormal_basis(torch.stack(vectors[i : i + k])) for i in stacks]

    def most(self, order: Sequence[AnyPlace]) -> int:
        """The largest k there can be."""
        if not self.of_one_place:
            return len(order)
        return len(self._directions_within(order))

    def _directions_within(self, order: Sequence[AnyPlace]) -> Tensor:
        """All directions [n, H] of the first place."""
        first = order[0]
        if self.nodes:
            return self.nodes[Place(first.layer, first.position)]
        return within_layer(
            self.direction(first), self.differences[first.position][:, first.layer - 1]
        )
