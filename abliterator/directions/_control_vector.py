"""Directions as a control vector of llama.cpp: what is added after blocks, in a GGUF file.

A control vector adds one constant to the residual stream after each block. So it can hold a mean
difference, to steer with; a removal, which depends on what the block wrote, it cannot express.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from abliterator.errors import DirectionError
from abliterator.files import write_bytes_atomic

if TYPE_CHECKING:
    from abliterator.directions._published import PublishedDirections


def save_control_vector(
    path: Path, published: PublishedDirections, *, layers: Sequence[int], scale: float
) -> None:
    """Writes scale r of some layers as a control vector for llama.cpp's `--control-vector`.

    llama.cpp adds `direction.N` to the output of block N, counted from 0: N = l - 1 of residual
    layer l. It has none for block 0, so layer 1 cannot be in it. Several layers add up, for what
    was added after one block is still there after the next.

    Args:
        path: of the GGUF file.
        published: the directions.
        layers: residual layers, 2 .. L.
        scale: of r; positive towards the behaviour, negative away from it.

    Raises:
        DirectionError: for a layer that no control vector reaches; without the package `gguf`; for
            a model whose blocks hold several residual streams.
    """
    if "streams" in published.metadata:
        raise DirectionError(
            "A control vector is added to one residual stream, and the blocks of a "
            f"{published.metadata['model_type']} hold several. Steer it in transformers "
            "(`load_directions(OUT).added`), or serve the checkpoint itself."
        )
    if not layers or 1 in layers:
        raise DirectionError(
            "llama.cpp adds nothing after the first block, so a control vector has no layer 1. "
            f"Give layers from 2 to {len(published.tensors['directions'])}."
        )
    vectors = {layer: (scale * published.direction(layer)).float() for layer in sorted(layers)}
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise DirectionError(
            "Control vectors are written by the package gguf: pip install 'abliterator[gguf]'."
        ) from error
    with TemporaryDirectory() as folder:
        written = Path(folder) / "vector.gguf"
        writer = GGUFWriter(written, "controlvector")
        writer.add_string("controlvector.model_hint", published.metadata["model_type"])
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer - 1}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_bytes_atomic(path, written.read_bytes())
