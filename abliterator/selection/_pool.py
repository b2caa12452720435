"""The candidate directions of a selection, and their stacks of k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterator.directions import Directions, Place, Position, Subspace, stack_at, within_layer
from abliterator.errors import DirectionError
from abliterator.subspace import orthonormal_basis


@dataclass(frozen=True)
class Pool:
    """Candidate places, and the directions there.

    Attributes:
        places: the candidates; where nothing is swept, in order of preference.
        directions: by position.
        shuffled: the same from shuffled labels, one mapping a shuffle: controls.
        differences: [N, L, H] by position, target - contrast of each pair. Where they are given, a
            stack is of the first place alone: its direction, then principal components of them.
    """

    places: Sequence[Place]
    directions: Mapping[Position, Directions]
    shuffled: Sequence[Mapping[Position, Directions]] = ()
    differences: Mapping[Position, Tensor] = field(default_factory=dict)

    def direction(self, place: Place) -> Tensor:
        """The direction r [H] of a place, as extracted."""
        return self.directions[place.position].vectors[place.layer - 1]

    def stack(self, order: Sequence[Place], k: int) -> Subspace:
        """The subspace of k directions, `order` being that of preference.

        Raises:
            DirectionError: for dependent directions, and where pairs differ along fewer than k.
        """
        if not self.differences:
            return stack_at(self.directions, order[:k])
        vectors, first = self._directions_within(order), order[0]
        if k > len(vectors):
            raise DirectionError(
                f"The pairs differ along {len(vectors)} directions at layer {first}, and k is {k}. "
                f"Give a smaller k, or more pairs."
            )
        names = [f"layer {first}", *(f"component {i} of layer {first}" for i in range(1, k))]
        return Subspace(orthonormal_basis(vectors[:k], names), (first.layer,))

    def shuffled_stacks(self, order: Sequence[Place], k: int, draws: int) -> list[Tensor]:
        """Q [H, k] each of as many directions from shuffled labels, up to `draws` of them.

        Of the same places, one shuffle each; within a layer, of k shuffles each.
        """
        if not self.differences:
            return [stack_at(shuffle, order[:k]).basis for shuffle in self.shuffled[:draws]]
        first = order[0]
        vectors = [shuffle[first.position].vectors[first.layer - 1] for shuffle in self.shuffled]
        stacks = range(0, min(draws * k, len(vectors) - k + 1), k)
        return [orthonormal_basis(torch.stack(vectors[i : i + k])) for i in stacks]

    def most(self, order: Sequence[Place]) -> int:
        """The largest k there can be."""
        if not self.differences:
            return len(order)
        return len(self._directions_within(order))

    def _directions_within(self, order: Sequence[Place]) -> Tensor:
        """All directions [n, H] of the first place."""
        first = order[0]
        return within_layer(
            self.direction(first), self.differences[first.position][:, first.layer - 1]
        )
