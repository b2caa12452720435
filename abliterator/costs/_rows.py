"""Memory that rows of a batch need beside the weights, and how many rows fit."""

from __future__ import annotations

from collections.abc import Callable

from abliterator.costs._shape import ModelShape

# Bytes of activations that a block holds, a number of the residual stream; and of logits.
_BLOCK_BYTES, _LOGIT_BYTES = 32, 12
_USED = 0.85  # share of the memory; the rest is for what kernels, drivers and others allocate
# Least and most rows. On a GPU decoding no longer waits for the weights at 512; on a processor 64
# take a quarter less time than 16, and 128 no less than 64 (SmolLM2, 32 and 128 tokens, one core).
_BOUNDS = {"cuda": (1, 512), "cpu": (16, 64)}
DEFAULT_ROWS = 16
"""Rows where the device's memory, or what a row needs of it, is not known."""


def cache_bytes(shape: ModelShape, rows: int, tokens: float, number_bytes: float) -> float:
    """Bytes of keys and values."""
    return rows * tokens * 2 * shape.key_width * shape.n_layers * number_bytes


def working_bytes(
    shape: ModelShape, rows: int, tokens: float, *, logits: int, number_bytes: float
) -> int:
    """Bytes that a batch needs beside the weights: its cache, activations and logits.

    Args:
        shape: of the model.
        rows: sequences.
        tokens: of each.
        logits: positions at which the output head runs, in all rows together.
        number_bytes: of a number in the dtype of computation.
    """
    activations = rows * tokens * shape.d_model * _BLOCK_BYTES
    return int(
        cache_bytes(shape, rows, tokens, number_bytes)
        + activations
        + logits * shape.vocabulary * _LOGIT_BYTES
    )


def rows_that_fit(
    shape: Callable[[], ModelShape], *, tokens: int, device: str, memory: int, number_bytes: float
) -> int:
    """Sequences of so many tokens that a model answers together on a device: a power of two.

    By the whole memory, not by what is free at the moment, which would give one machine other
    batches, and in bfloat16 other answers, from run to run; a batch that does not fit on a GPU is
    halved.

    Args:
        shape: gives that of the model, where memory decides.
        tokens: of the longest sequence with its answer.
        device: as torch names it.
        memory: bytes of it, or of all devices that the weights are spread over.
        number_bytes: of a number in the dtype of computation.
    """
    bounds = _BOUNDS.get(device.partition(":")[0])
    if bounds is None:
        return DEFAULT_ROWS
    model = shape()
    left = _USED * memory - model.parameters * number_bytes
    each = working_bytes(model, 1, tokens, logits=1, number_bytes=number_bytes)
    least, most = bounds
    rows = max(least, min(most, int(left / each)))
    return 1 << rows.bit_length() - 1
