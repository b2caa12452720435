"""What a model's headers say of its cost: its matrices, its layers and its bytes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from abliterator.anatomy import Anatomy
from abliterator.checkpoint import DTYPE_BITS, Checkpoint
from abliterator.formats import PackedLayout

_EXPERT = re.compile(r"\bexperts\.(\d+\.)?")
_KEY = re.compile(r"\b(k_proj|kv_a_proj_with_mqa)\.weight$")
# What configs call the number of experts that a token goes through.
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class Matrix:
    """Matrices of one shape in all blocks together.

    Attributes:
        inner: length of the vectors that it multiplies.
        outer: length of the products.
        count: of such matrices.
        expert: whether a router chooses which tokens it multiplies.
    """

    inner: int
    outer: int
    count: int
    expert: bool = False


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its cost depends on.

    Attributes:
        matrices: of the blocks.
        n_layers: blocks.
        d_model: width of the residual stream.
        vocabulary: rows of the output head.
        key_width: numbers of a token's keys in one block; its values have as many.
        experts: routed experts of a block; 0 where there are none.
        active: experts that a token goes through.
        parameters: numbers of all tensors.
        stored: bytes of all tensors.
    """

    matrices: tuple[Matrix, ...]
    n_layers: int
    d_model: int
    vocabulary: int
    key_width: int
    experts: int
    active: int
    parameters: int
    stored: int

    @property
    def active_parameters(self) -> float:
        """Parameters of the blocks that multiply one token: N of 2 N FLOPs a token."""
        share = self.active / self.experts if self.experts else 1.0
        return sum(m.inner * m.outer * m.count * (share if m.expert else 1) for m in self.matrices)


def shape_of(checkpoint: Checkpoint, anatomy: Anatomy) -> ModelShape:
    """The shape of a checkpoint, from its headers and its config.

    A tensor of two dimensions or more in a block counts as a matrix that multiplies every token,
    unless its name says that it is an expert's.
    """
    shapes = _shapes(checkpoint, anatomy)
    counted = Counter(
        matrix
        for name, shape in shapes.items()
        if f"{anatomy.blocks}." in name and len(shape) > 1
        for matrix in _matrices(name, shape)
    )
    config = _text_config(checkpoint.config)
    vocabulary = config.get("vocab_size") or max(s[0] for s in shapes.values() if len(s) > 1)
    return ModelShape(
        matrices=tuple(
            Matrix(inner, outer, count, expert)
            for (inner, outer, expert), count in sorted(counted.items())
        ),
        n_layers=anatomy.n_layers,
        d_model=anatomy.d_model,
        vocabulary=int(vocabulary),
        key_width=_key_width(shapes, config, anatomy),
        experts=anatomy.n_experts,
        active=_active(config, anatomy.n_experts),
        parameters=sum(map(math.prod, shapes.values())),
        stored=sum(info.nbytes for info in checkpoint.tensors.values()),
    )


def _shapes(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
    """Shapes in numbers by the names of plain weights, without what packed ones are read with."""
    storage, tensors = anatomy.storage, checkpoint.tensors
    layouts = {name: storage.quantized_layout(name, tensors) for name in tensors}
    packed = {
        name: layout.dense for name, layout in layouts.items() if isinstance(layout, PackedLayout)
    }
    owners = {layout.name for layout in packed.values()}
    shapes = {
        name: _unpacked(info.shape, info.dtype)
        for name, info in tensors.items()
        if name not in packed and (storage.owner(name) == name or storage.owner(name) not in owners)
    }
    return shapes | {layout.name: layout.shape for layout in packed.values()}


def _unpacked(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """The shape in numbers: of MXFP4 a byte holds two."""
    return (*shape[:-1], shape[-1] * 2) if dtype == "U8" and shape else shape


def _matrices(name: str, shape: tuple[int, ...]) -> Iterable[tuple[int, int, bool]]:
    """(inner, outer, whether an expert's) of a tensor, for each matrix that it holds."""
    expert = _EXPERT.search(name) is not None
    if expert and len(shape) > 2:  # all experts of a block in one tensor
        yield from [(math.prod(shape[2:]), shape[1], True)] * shape[0]
    else:
        yield math.prod(shape[1:]), shape[0], expert


def _key_width(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], anatomy: Anatomy
) -> int:
    """Of a block's key projection; else by the heads of the config, else d_model."""
    widths = [shape[0] for name, shape in shapes.items() if _KEY.search(name)]
    if widths:
        return max(widths)
    heads = config.get("num_attention_heads") or 1
    keys = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or anatomy.d_model // heads
    return int(keys * head)


def _active(config: Mapping[str, Any], experts: int) -> int:
    stated = (config.get(name) for name in _ACTIVE)
    number = next((n for n in stated if isinstance(n, int) and n > 0), min(2, experts))
    return min(number, experts)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def dtype_bytes(dtype: str) -> float:
    """Bytes of a number in a dtype, as torch or safetensors names it."""
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    return DTYPE_BITS[names.get(dtype, dtype)] / 8
