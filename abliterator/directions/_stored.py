"""The artefact of directions and their subspace, and subspaces from files of any program."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from abliterator.directions._fit import Directions, Subspace
from abliterator.errors import DirectionError
from abliterator.files import write_bytes_atomic
from abliterator.subspace import is_by_writer, orthonormal_columns


def save_directions(path: Path, directions: Directions, subspace: Subspace) -> None:
    """Writes `directions` and `subspace` with the layers as metadata, atomically."""
    tensors = {"directions": directions.vectors, "subspace": subspace.basis.contiguous()}
    data = save(tensors, metadata={"layers": json.dumps(subspace.layers)})
    write_bytes_atomic(path, data)


def load_subspace(path: Path) -> Subspace:
    """Reads `subspace` from any safetensors file, and makes its columns orthonormal.

    It is [H, k] for all blocks, or [L, H, k]: one for each block. Pairs [M, 2, H, r], U and V of
    each module that writes, are read as they are.

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
    is_pairs = columns is not None and is_by_writer(columns) and columns.shape[1] == 2
    is_basis = columns is not None and columns.ndim in (2, 3)
    if columns is None or not (is_pairs or is_basis) or not columns.is_floating_point():
        seen_shape = (
            "" if columns is None else f", `subspace` as {columns.dtype} {list(columns.shape)}"
        )
        raise DirectionError(
            f"{path} must hold a floating-point tensor `subspace` of shape [d_model, k], or "
            "[n_layers, d_model, k] with one subspace a block; it holds "
            f"{', '.join(names) or 'nothing'}{seen_shape}."
        )
    if 0 in columns.shape:
        axes = ["n_layers", "d_model", "k"][-columns.ndim :]
        if is_pairs:
            axes = ["n_modules", "2", "d_model", "r"]
        sizes = dict(zip(axes, columns.shape, strict=True))
        empty = next(name for name, size in sizes.items() if size == 0)
        raise DirectionError(f"`subspace` in {path} has shape {list(columns.shape)}: {empty} is 0.")
    if is_pairs:
        if not bool(columns.isfinite().all()):
            raise DirectionError(
                f"`subspace` in {path}, pairs (U, V) of shape {list(columns.shape)}, holds numbers "
                "that are not finite. Build it again."
            )
        return Subspace(columns.double(), _layers(metadata))
    return Subspace(orthonormal_columns(columns), _layers(metadata))


def _layers(metadata: dict[str, str]) -> tuple[int, ...]:
    try:
        layers = json.loads(metadata.get("layers", "[]"))
    except json.JSONDecodeError:
        return ()  # a file of another program, in which `layers` means something else
    is_valid = isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)
    return tuple(layers) if is_valid else ()
