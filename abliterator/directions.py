"""From moments to directions, and from directions to the subspace that is removed.

Reads moments of prompt sets and writes one artefact, directions.safetensors, with `directions`
[L, H] (row l - 1 belongs to residual layer l) and `subspace` [H, k], or [L, H, k] where each block
has one of its own. This module reads no model and no weights.

    directions = fit_directions(target, contrast)
    subspace = stack(directions, layers=(16, 15, 17))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from abliterator.errors import DirectionError
from abliterator.files import write_bytes_atomic
from abliterator.subspace import DEPENDENT_BELOW, MomentSet, orthonormal_basis, orthonormal_columns


@dataclass(frozen=True)
class Directions:
    """One direction per residual layer, not normalised.

    Attributes:
        vectors: [L, H] float64; row l - 1 belongs to layer l.
    """

    vectors: Tensor


class Place(NamedTuple):
    """The layer and token position of a direction.

    Attributes:
        layer: residual layer, 1 .. L.
        position: token of the prompt, from its end.
    """

    layer: int
    position: int = -1

    def __str__(self) -> str:
        """The layer, and the position where it is not the last token."""
        return f"{self.layer}" if self.position == -1 else f"{self.layer} at {self.position}"


@dataclass(frozen=True)
class Subspace:
    """The rank-k subspace that an edit removes.

    Attributes:
        basis: Q [H, k] float64, orthonormal columns; or [L, H, k], of which Q[i] is removed from
            what block i (0 .. L - 1) writes.
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
        mean = torch.nn.functional.normalize(remove_mean_of.mean, dim=1)
        vectors = vectors - (vectors * mean).sum(dim=1, keepdim=True) * mean
    return Directions(vectors)


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


def stack_at(directions: Mapping[int, Directions], places: Sequence[Place]) -> Subspace:
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


def save_directions(path: Path, directions: Directions, subspace: Subspace) -> None:
    """Writes `directions` and `subspace` with the layers as metadata, atomically."""
    tensors = {"directions": directions.vectors, "subspace": subspace.basis.contiguous()}
    data = save(tensors, metadata={"layers": json.dumps(subspace.layers)})
    write_bytes_atomic(path, data)


def load_subspace(path: Path) -> Subspace:
    """Reads `subspace` from any safetensors file, and makes its columns orthonormal.

    It is [H, k] for all blocks, or [L, H, k]: one for each block.

    Raises:
        DirectionError: if the file cannot be read, lacks it, or its columns are dependent; the
            column is named, and its block.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            columns = file.get_tensor("subspace") if "subspace" in names else None
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DirectionError(f"Cannot read a subspace from {path}: {error}.") from error
    if columns is None or columns.ndim not in (2, 3) or not columns.is_floating_point():
        seen_shape = (
            "" if columns is None else f", `subspace` as {columns.dtype} {list(columns.shape)}"
        )
        raise DirectionError(
            f"{path} must hold a floating-point tensor `subspace` of shape [d_model, k], or "
            "[n_layers, d_model, k] with one subspace a block; it holds "
            f"{', '.join(names) or 'nothing'}{seen_shape}."
        )
    if 0 in columns.shape:
        sizes = dict(zip(("n_layers", "d_model", "k")[-columns.ndim :], columns.shape, strict=True))
        empty = next(name for name, size in sizes.items() if size == 0)
        raise DirectionError(f"`subspace` in {path} has shape {list(columns.shape)}: {empty} is 0.")
    return Subspace(orthonormal_columns(columns), _layers(metadata))


def _layers(metadata: dict[str, str]) -> tuple[int, ...]:
    try:
        layers = json.loads(metadata.get("layers", "[]"))
    except json.JSONDecodeError:
        return ()  # a file of another program, in which `layers` means something else
    is_valid = isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)
    return tuple(layers) if is_valid else ()
