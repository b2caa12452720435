"""The intervention on the residual stream, which no edit of weights equals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.model import LoadedModel


@contextmanager
def intervene(
    loaded: LoadedModel, blocks: Sequence[str], basis: Tensor, alpha: float
) -> Iterator[None]:
    """Removes Q from the output of every block at run time: h <- h - alpha Q Qᵀ h.

    What tokens and other blocks wrote is removed too, but within a block the MLP still reads what
    attention just wrote; an edit of the writers (`preview_edit`) does neither.

    Args:
        loaded: the base.
        blocks: module paths of all blocks.
        basis: Q [H, k], orthonormal.
        alpha: 1 removes; 0 leaves every bit.
    """
    import torch

    from abliterator.model import hooked
    from abliterator.subspace import removal_of_basis

    wide = torch.promote_types(loaded.model.dtype, torch.float32)
    removal = removal_of_basis(basis).to(wide, loaded.device)

    def remove(hidden: Tensor) -> Tensor:
        stream = hidden.to(wide)
        return (stream - alpha * removal.removed(stream)).to(hidden.dtype)

    with hooked(loaded.model, dict.fromkeys(blocks, remove)):
        yield
