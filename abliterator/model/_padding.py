"""Whether padding, or a beginning that runs once for all rows, changes what a model computes.

Positions and distances counted by index, windows, recurrent states and selections of keys break on
it, each in types of its own. So it is measured on the loaded model, once, and read from no list:
the same prompt with and without, and the distributions that follow compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from abliterator.model._limits import context_limit
from abliterator.model._run import cache_name, head_at, is_out_of_memory, positions_from

if TYPE_CHECKING:
    from abliterator.model._load import LoadedModel
    from abliterator.model._prefix import Prefix

PADS = 256  # at least so many, where the context has room: a small error of position shows then
# Mean absolute difference of log-probabilities, as a share of their spread. Rounding alone stays
# below 1e-5 in float32 and 0.03 in bfloat16; a wrong position or state goes beyond 0.1.
TOLERANCE = {torch.float32: 5e-5, torch.float16: 0.03, torch.bfloat16: 0.08}
COMPARED = 16  # positions
LEAST_LOGPROB = -50.0  # a suppressed token's -inf has no difference to anything

# What a model raises at inputs that it cannot take: to fail is to differ.
_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)

Pair = tuple[Tensor, Tensor]

# By model: what was tried, and up to which width of a row it changed nothing; -1 where it did.
_known: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


def continues_alike(
    loaded: LoadedModel, prompt: Sequence[int], prefix: Prefix, *, rows: int
) -> bool:
    """Whether a prompt's rest, after the cached prefix, gives what the whole prompt gives.

    Run in as many rows as the prefix has, whose interventions are the ones in force.
    """

    def run(_: int) -> Pair:
        whole = torch.tensor([list(prompt)] * rows, device=loaded.device)
        rest = whole[:, prefix.length :]
        cache = {cache_name(loaded.model): prefix.copied(range(rows)), "use_cache": True}
        positions = positions_from(loaded.model, prefix.length, rest)
        continued = _logits(loaded, rest, rest.shape[1], **cache, **positions)
        return _logits(loaded, whole, whole.shape[1])[-len(continued) :], continued

    return _changes_nothing(loaded, "shared", 0, run)


def right_padding_is_neutral(loaded: LoadedModel, row: Sequence[int], *, width: int) -> bool:
    """Whether padding after a row, to at least `width` tokens, leaves what it gives."""

    def run(width: int) -> Pair:
        pads = _pads(loaded, len(row), width)
        alone = torch.tensor([list(row)], device=loaded.device)
        padded = torch.nn.functional.pad(alone, (0, pads))
        mask = (torch.arange(len(row) + pads, device=loaded.device) < len(row)).long()[None]
        after = _logits(loaded, padded, len(row), attention_mask=mask)
        return _logits(loaded, alone, len(row)), after

    return _changes_nothing(loaded, "right", width, run)


def padding_is_neutral(
    loaded: LoadedModel,
    answer: Callable[[int], Tensor],
    length: int,
    *,
    shared: bool,
    width: int,
) -> bool:
    """Whether padding before a prompt, or between what is shared and its rest, keeps its answer.

    Args:
        loaded: the model.
        answer: logits [tokens, V] of the greedy answer to a prompt that has so many pads.
        length: of that prompt.
        shared: whether it continues a cache, which the pads come after.
        width: of the widest row that will be padded, its answer included.
    """

    def run(width: int) -> Pair:
        alone, padded = answer(0), answer(_pads(loaded, length, width))
        steps = min(len(alone), len(padded))
        same = alone[:steps].argmax(-1) == padded[:steps].argmax(-1)
        # where two tokens nearly tie the answers part, and what follows is not comparable
        steps = min(steps, 1 + int(same.int().cumprod(0).sum()))
        return alone[:steps], padded[:steps]

    return _changes_nothing(loaded, "between" if shared else "left", width, run)


def cache_is_continued(loaded: LoadedModel, run: Callable[[], Pair]) -> bool:
    """Whether several tokens that continue a cache give what they give after the whole prompt.

    Some recurrent models take them for the beginning of another prompt.

    Args:
        loaded: the model.
        run: log-probabilities both ways.
    """
    return _changes_nothing(loaded, "continued", 0, lambda _: run())


def _changes_nothing(
    loaded: LoadedModel, what: str, width: int, run: Callable[[int], Pair]
) -> bool:
    """Whether both of a pair are the same but for rounding, measured unless it is known."""
    known = _known.setdefault(loaded.model, {})
    if what in known and not 0 <= known[what] < width:
        return known[what] >= 0
    try:
        with torch.no_grad():
            same = _same(*run(width), loaded.model.dtype)
    except _FAILURES as error:
        if is_out_of_memory(error):
            return False
        same = False
    known[what] = width if same else -1
    return same


def _same(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    a, b = (x.float().log_softmax(-1).clamp_min(LEAST_LOGPROB) for x in (one, other))
    apart = (a - b).abs().mean(-1) / a.std(-1).clamp_min(1e-3)
    return bool((apart <= TOLERANCE.get(dtype, TOLERANCE[torch.float32])).all())


def _pads(loaded: LoadedModel, length: int, width: int) -> int:
    """Pads that make a row as wide as any, and `PADS` where the context has room for them."""
    limit = context_limit(loaded.model.config)
    wanted = max(width - length, PADS)
    return max(1, wanted if limit is None else min(wanted, limit - length))


def _logits(loaded: LoadedModel, ids: Tensor, length: int, **given: Any) -> Tensor:
    """Logits [P, V] at the last of the first `length` tokens of row 0, `COMPARED` at most."""
    compared = torch.arange(max(0, length - COMPARED), length)
    with head_at(loaded.model.get_output_embeddings(), torch.zeros_like(compared), compared):
        logits: Tensor = loaded.model(input_ids=ids, **{"use_cache": False, **given}).logits
    return logits[0]
