"""Residual vectors of the prompt sets that directions are estimated from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterator.errors import DirectionError
from abliterator.subspace import Moments, MomentSet

_TOGETHER = 64  # prompts


@dataclass(frozen=True)
class Observations:
    """Residual vectors of the prompt sets at one token position, as moments and one by one.

    Attributes:
        target: moments [L, H] of the prompts on which the behaviour shows.
        contrast: of prompts as like them as possible but for the behaviour.
        neutral: of ordinary prompts, where the contrast is another set.
        protected: of the sets whose directions are left alone, by name.
        vectors: [N, L, H] float32 of every prompt: "target", "contrast", and "differences"
            (target - contrast of each pair); only those that are needed.
    """

    target: MomentSet
    contrast: MomentSet
    neutral: MomentSet | None = None
    protected: Mapping[str, MomentSet] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_vectors(cls, target: Tensor, contrast: Tensor) -> Observations:
        """The observations of two sets [N, L, H], of any floating dtype, with their moments."""
        return cls(
            moments_of(target),
            moments_of(contrast),
            vectors={"target": target, "contrast": contrast},
        )

    @property
    def ordinary(self) -> MomentSet:
        """Moments of the neutral prompts: of a set of their own, or of the contrast."""
        return self.neutral or self.contrast

    def at_layer(self, name: str, layer: int) -> Tensor:
        """[N, H] float64, the vectors of one set at a residual layer, 1 .. L.

        Raises:
            DirectionError: if they were not captured.
        """
        if name not in self.vectors:
            raise DirectionError(
                f"The residual vectors `{name}` of single prompts are needed, and only moments "
                "were captured. Capture them (`capture_vectors`)."
            )
        return self.vectors[name][:, layer - 1].double()

    def classes(self, layer: int) -> tuple[Tensor, Tensor]:
        """[N, H] float64 of the target and of the contrast prompts at a residual layer."""
        return self.at_layer("target", layer), self.at_layer("contrast", layer)


def moments_of(vectors: Tensor) -> MomentSet:
    """The moments of [N, L, H] vectors, of which few are held in float64 at once."""
    moments = Moments(vectors.shape[1], vectors.shape[2])
    for part in torch.split(vectors, _TOGETHER):
        moments.update(part)
    return moments.freeze()


def as_long_as(reference: Tensor, vector: Tensor) -> Tensor:
    """A vector [H] scaled to the length of another; of no length it stays 0."""
    scaled: Tensor = torch.nn.functional.normalize(vector, dim=0, eps=1e-300) * reference.norm()
    return scaled
