"""Checks logits for NaN and infinity, and locates the module that produced them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from abliterator.errors import GenerationError
from abliterator.model._run import hooked

if TYPE_CHECKING:
    from abliterator.model._load import LoadedModel


def require_numbers(logits: Tensor, loaded: LoadedModel, *, where: str = "") -> Tensor:
    """Returns the logits unchanged, or raises where one is NaN or +inf.

    -inf is a number here: models give it to entries of the vocabulary that they never use, which
    then have probability 0. A row of nothing else has no distribution.

    Args:
        logits: [..., V].
        loaded: the model that gave them, for the message.
        where: a further half sentence of it.

    Raises:
        GenerationError: it names the model, what was seen, and what to do.
    """
    # one pass over the largest tensor there is: NaN is passed on, and +inf and all -inf show too
    highest = logits.detach().amax(dim=-1)
    if highest.isfinite().all():
        return logits
    problem = "NaN" if highest.isnan().any() else "infinite"
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    raise GenerationError(
        f"The next-token logits of the model in {loaded.folder} are {problem}, computed in "
        f"{dtype}{where}. It overflows in this dtype, or its weights are damaged; try "
        "`--dtype float32`, or download or make the model again."
    )


def require_first_pass(loaded: LoadedModel, ids: Tensor) -> None:
    """Runs a model once, and raises where its logits are not finite.

    Args:
        loaded: the model, as it was just loaded.
        ids: token ids [1, T] that it can read.

    Raises:
        GenerationError: it names the module whose output was the first that is not finite.
    """
    with torch.inference_mode():
        logits = loaded.model(input_ids=ids, use_cache=False).logits
        if not logits.amax(dim=-1).isfinite().all():
            first = _first_not_finite(loaded.model, ids)
            require_numbers(logits, loaded, where=f", and so is the output of {first}")


def _first_not_finite(model: nn.Module, ids: Tensor) -> str:
    """Path of the first module, in the order of the pass, whose output holds NaN or infinity."""
    paths: list[str] = []

    def note(path: str, output: object) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            paths.append(path)

    hooks = {path: partial(note, path) for path, _ in model.named_modules() if path}
    with hooked(model, hooks):
        model(input_ids=ids, use_cache=False)
    return paths[0] if paths else "the output head"
