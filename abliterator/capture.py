"""Mean and spread of the residual stream over prompts, at every layer.

Residual l (1 to n_layers) is the output of block l - 1. Prompts run in batches of equal token
length, without padding, so a batch gives the values of its prompts run alone.

    moments = capture(engine, token_ids)
    moments.mean[9 - 1]                             # mean residual at layer 9, float64
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from abliterator.engines import Engine, OnBatch, Padding
from abliterator.files import write_bytes_atomic
from abliterator.subspace import Moments, MomentSet, require_finite


def capture(
    engine: Engine,
    token_ids: Sequence[Sequence[int]],
    *,
    position: int = -1,
    padding: Padding = "none",
    max_batch_tokens: int = 4096,
    share_prefix: bool = False,
    on_batch: OnBatch | None = None,
) -> MomentSet:
    """Mean and spread of the residual stream at `position`, over prompts, at every layer.

    Args:
        engine: the model.
        token_ids: one rendered prompt each.
        position: counted from the end of each prompt: -1 is its last token.
        padding: "none", or "left" as most tools do it (`Engine.hidden_states`).
        max_batch_tokens: tokens in a batch, padding included.
        share_prefix: run what all prompts begin with once (`Engine.hidden_states`).
        on_batch: called with the number of prompts done after each batch.

    Returns:
        [n_layers, d_model] float64 moments; row l - 1 is residual l.

    Raises:
        DirectionError: without prompts, for a prompt with no token at `position`, for NaN.
        PromptError: for a prompt that is longer than what the model reads.
    """
    moments = Moments(*engine.hidden_shape)
    for batch, residuals in engine.hidden_states(
        token_ids,
        positions=(position,),
        padding=padding,
        max_batch_tokens=max_batch_tokens,
        share_prefix=share_prefix,
    ):
        moments.update(residuals[:, 0])
        if on_batch:
            on_batch(len(batch))
    return moments.freeze()


def capture_vectors(
    engine: Engine,
    token_ids: Sequence[Sequence[int]],
    *,
    position: int = -1,
    padding: Padding = "none",
    max_batch_tokens: int = 4096,
    share_prefix: bool = False,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """The residual stream of every prompt at `position`, [N, L, H] float32; else as `capture`.

    4 N L H bytes: .2 GB for 416 prompts of a model with 32 layers and 4,096 dimensions.
    """
    vectors = torch.zeros(len(token_ids), *engine.hidden_shape)
    for batch, residuals in engine.hidden_states(
        token_ids,
        positions=(position,),
        padding=padding,
        max_batch_tokens=max_batch_tokens,
        share_prefix=share_prefix,
    ):
        vectors[batch] = residuals[:, 0].float().cpu()
        require_finite(vectors[batch])
        if on_batch:
            on_batch(len(batch))
    return vectors


def save_moments(path: Path, moments: Mapping[str, MomentSet]) -> None:
    """Writes moments of several prompt sets as safetensors: NAME.mean, NAME.m2, NAME.n."""
    tensors = {}
    for name, moment_set in moments.items():
        tensors[f"{name}.mean"], tensors[f"{name}.m2"] = moment_set.mean, moment_set.m2
        tensors[f"{name}.n"] = torch.tensor(moment_set.n)
    write_bytes_atomic(path, save(tensors))


def load_moments(path: Path) -> dict[str, MomentSet]:
    """Reads the moments in a file of `save_moments`, by name."""
    tensors = load_file(path)
    names = {name.rpartition(".")[0] for name in tensors}
    return {
        name: MomentSet(int(tensors[f"{name}.n"]), tensors[f"{name}.mean"], tensors[f"{name}.m2"])
        for name in sorted(names)
    }
