"""The leak meter: what each block still writes into a subspace, measured by running the model.

It needs no anatomy: a block is whatever the model calls its blocks, and its write is its output
minus its input, or minus the share of its input that it keeps. Of a block that holds several
streams, every output of a sublayer is a write: what it hands to the mixing.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

# By model_type, the number by which block l multiplies the stream before it adds; 1 elsewhere.
_KEPT = {"beam": lambda layer: ((2 * layer + 1) / (2 * layer + 3)) ** 0.5}


def leak_meter(model: nn.Module, basis: Tensor, token_ids: Tensor, **also: Tensor) -> list[float]:
    """Per block, the largest |Rᵀ (h_out - a h_in)| / |h_out - a h_in| over all positions.

    Of several streams, per sublayer: the largest |Rᵀ h_out| / |h_out|.

    Args:
        model: a causal LM in evaluation mode.
        basis: R [H, k], orthonormal.
        token_ids: [N, T].
        also: further inputs of the model.
    """
    writes: list[Tensor] = []
    kept = _KEPT.get(model.config.get_text_config().model_type, lambda _layer: 1.0)

    def measure(layer, _block, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        writes.append(after.double() - kept(layer) * before.double())

    def measure_sublayer(_module, _args, output):
        writes.append((output[0] if isinstance(output, tuple) else output).double())

    handles = [
        module.register_forward_hook(measure_sublayer)
        for block in _blocks(model)
        for module in sublayers(block)
    ]
    handles = handles or [
        block.register_forward_hook(partial(measure, layer), with_kwargs=True)
        for layer, block in enumerate(_blocks(model))
    ]
    try:
        with torch.inference_mode():
            model(input_ids=token_ids, use_cache=False, **also)
    finally:
        for handle in handles:
            handle.remove()
    projected = [(write @ basis.double()).norm(dim=-1) / write.norm(dim=-1) for write in writes]
    return [float(ratio.max()) for ratio in projected]


def sublayers(block: nn.Module) -> list[nn.Module]:
    """What a block of several streams mixes into them; none of a block of one stream."""
    children = dict(block.named_children())
    if not {"attn_hc", "attn_hyper_connection"} & {*children}:
        return []
    return [children[name] for name in ("self_attn", "linear_attn", "mlp") if name in children]


def _blocks(model: nn.Module) -> nn.ModuleList:
    wanted = model.config.get_text_config().num_hidden_layers
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    }
    if len(found) > 1:  # towers have lists of their own
        text = ("language_model.layers", "text_model.layers")
        found = {path: module for path, module in found.items() if path.endswith(text)}
    assert len(found) == 1, "the model has not exactly one list of blocks"
    return next(iter(found.values()))
