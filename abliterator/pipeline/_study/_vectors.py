"""Residual vectors of every prompt, captured once for estimates of any kind and of any labels."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from abliterator.pipeline._positions import Reading, readings
from abliterator.pipeline._run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.directions import Cleaning, Directions, Observations, Position
    from abliterator.prompts import Prompt, PromptSet

PROTECTED = "protect."  # what the names of protected sets begin with
KINDS = ("target", "contrast")
# Indices of the prompts on one side, and on the other; target prompts come first.
Split: TypeAlias = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class LayerObservations:
    """Observations at some layers of a model.

    Attributes:
        observations: row i of their layers is that of `layers[i]`.
        layers: residual layers, from 1.
        n_layers: that the model has.
    """

    observations: Observations
    layers: Sequence[int]
    n_layers: int

    def directions(self, estimator: str, cleaning: Cleaning) -> Directions:
        """An estimate at the captured layers; zeros at the others."""
        import torch

        from abliterator.directions import Directions, estimate

        rows = estimate(estimator, self.observations, cleaning).vectors
        whole = torch.zeros(self.n_layers, rows.shape[1], dtype=rows.dtype)
        whole[[layer - 1 for layer in self.layers]] = rows
        return Directions(whole)

    def unprotected(self) -> LayerObservations:
        """The same without protected sets."""
        return replace(self, observations=replace(self.observations, protected={}))

    def relabelled(self, split: Split) -> LayerObservations:
        """The same prompts, those of one side as target and those of the other as contrast."""
        import torch

        from abliterator.directions import moments_of

        vectors = torch.cat([self.observations.vectors[name] for name in KINDS])
        target, contrast = (vectors[list(side)] for side in split)
        observations = replace(
            self.observations,
            target=moments_of(target),
            contrast=moments_of(contrast),
            vectors={"target": target, "contrast": contrast},
        )
        return replace(self, observations=observations)

    def balanced(self, seed: str) -> LayerObservations:
        """Shuffled labels: halves with as many prompts of each kind, whose difference cancels.

        Args:
            seed: with a place for the `name` of the kind.
        """
        n_target, n_contrast = (len(self.observations.vectors[name]) for name in KINDS)
        kinds = range(n_target), range(n_target, n_target + n_contrast)
        sides: tuple[list[int], list[int]] = [], []
        for name, of_kind in zip(KINDS, kinds, strict=True):
            indices = list(of_kind)
            random.Random(seed.format(name=name)).shuffle(indices)
            sides[0].extend(indices[::2])
            sides[1].extend(indices[1::2])
        return self.relabelled(sides)


def observed(
    run: Run,
    sets: Mapping[str, Sequence[Prompt]],
    layers: Sequence[int],
    positions: Sequence[Position],
    *,
    protected: Mapping[str, Sequence[Prompt]] | None = None,
) -> dict[Position, LayerObservations]:
    """Observations of prompt sets at some layers, by position.

    Args:
        run: the run.
        sets: "target" and "contrast", whose vectors are kept, and "neutral" where it is needed.
        layers: residual layers, from 1.
        positions: tokens of the prompt.
        protected: sets by name.
    """
    from abliterator.directions import Observations, moments_of

    protected = protected or {}
    vectors = {
        name: _captured(run, name, prompts, layers, positions)
        for name, prompts in {**sets, **protected}.items()
    }
    n_layers = run.plan.anatomy.n_layers
    by_position = {}
    for position in positions:
        at = {name: of_set[position] for name, of_set in vectors.items()}
        observations = Observations(
            moments_of(at["target"]),
            moments_of(at["contrast"]),
            neutral=moments_of(at["neutral"]) if "neutral" in at else None,
            protected={name: moments_of(at[name]) for name in protected},
            vectors={name: at[name] for name in KINDS},
        )
        by_position[position] = LayerObservations(observations, layers, n_layers)
    return by_position


def protected_prompts(extraction: Mapping[str, PromptSet]) -> dict[str, Sequence[Prompt]]:
    """The prompts of the protected sets among those of extraction, by their own names."""
    return {
        name.removeprefix(PROTECTED): of.prompts
        for name, of in extraction.items()
        if name.startswith(PROTECTED)
    }


def _captured(
    run: Run,
    name: str,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    positions: Sequence[Position],
) -> dict[Position, Tensor]:
    """[N, layers, H] float32 of one set by position, on the CPU."""
    import torch

    from abliterator.subspace import require_finite

    engine, settings = run.engine(run.plan.source.folder), run.recipe.capture
    rows, width = [layer - 1 for layer in layers], run.plan.anatomy.d_model
    by_position: dict[Position, Tensor] = {}
    for reading in _together(list(readings(run, engine, name, prompts, positions))):
        n, offsets = len(reading.token_ids), reading.offsets
        vectors = torch.zeros(n, len(offsets), len(layers), width)
        with run.progress.bar(f"vectors of {name}", n) as advance:
            for batch, residuals in engine.hidden_states(
                reading.token_ids,
                positions=offsets,
                padding=settings.padding,
                max_batch_tokens=settings.max_batch_tokens,
                share_prefix=settings.share_prefix,
            ):
                on_host = residuals.float().cpu()
                require_finite(on_host.flatten(0, 1))
                vectors[batch] = on_host[:, :, rows]
                advance(len(batch))
        by_position |= {p: vectors[:, i] for i, p in enumerate(reading.positions)}
    return by_position


def _together(several: list[Reading]) -> list[Reading]:
    """The passes over a set, the end of the user's text being read with tokens of the template.

    That is one pass where the template writes as many tokens after every prompt.
    """
    if [reading.positions[-1:] for reading in several[1:2]] != [("instruction",)]:
        return several
    template, text, *rest = several  # `readings` gives them in this order
    pairs = zip(template.token_ids, text.token_ids, strict=True)
    tails = {len(ids) - len(beginning) for ids, beginning in pairs}
    if len(tails) > 1:
        return several
    positions = (*template.positions, "instruction")
    offsets = (*template.offsets, -1 - tails.pop())
    return [template._replace(positions=positions, offsets=offsets), *rest]
