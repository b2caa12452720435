"""Measures whether padding, or a prefix shared by all rows, changes what a model computes.

Positions and distances counted by index, windows, recurrent states and selections of keys break on
it, in different types of models. So there is no list of types: the loaded model runs a prompt both
ways, once, and the next-token distributions are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from abliterator.devices import is_out_of_memory
from abliterator.model._limits import context_limit
from abliterator.model._run import BATCH, cache_name, head_at, output_head, positions_from

if TYPE_CHECKING:
    from abliterator.model._load import LoadedModel
    from abliterator.model._prefix import Prefix

PADS = 256  # at least so many, where the context has room: a small error of position shows then
# Mean absolute difference of log-probabilities, as a share of their spread. Rounding alone stays
# below 1e-5 in float32 and 0.03 in bfloat16; a wrong position or state goes beyond 0.1.
TOLERANCE = {torch.float32: 5e-5, torch.float16: 0.03, torch.bfloat16: 0.08}
COMPARED = 16  # positions
_CHOSEN_KEYS = ("index_topk", "indexer_budget")  # what configs call how many keys a query reads
LEAST_LOGPROB = -50.0  # a suppressed token's -inf has no difference to anything

# Exceptions for inputs that a model cannot process; they count as a difference.
_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)

Pair = tuple[Tensor, Tensor]

# By model and test: the widest row, in tokens, that changed nothing; -1 where one did.
_neutral_widths: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


def continues_alike(
    loaded: LoadedModel, prompt: Sequence[int], prefix: Prefix, *, rows: int
) -> bool:
    """Whether a prompt's rest, after the cached prefix, has the logits of the whole prompt.

    Runs as many rows as the prefix has, under the interventions in force.
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
    """Whether padding after a row, to at least `width` tokens, leaves its logits unchanged."""

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
    """Whether padding before a prompt, or after a shared prefix, leaves its answer unchanged.

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


def packing_is_neutral(loaded: LoadedModel, run: Callable[[], Pair], *, width: int) -> bool:
    """Whether a row among others in one sequence, masked from them, has the logits of it alone.

    Recurrent states and distances counted by index do not keep the rows apart.

    Args:
        loaded: the model.
        run: logits both ways.
        width: of the widest row, in tokens.
    """
    return _changes_nothing(loaded, "packed", width, lambda _: run())


def cache_is_continued(loaded: LoadedModel, run: Callable[[], Pair]) -> bool:
    """Whether several tokens that continue a cache have the logits of an uncached pass.

    Some recurrent models treat them as the beginning of another prompt.

    Args:
        loaded: the model.
        run: log-probabilities both ways.
    """
    return _changes_nothing(loaded, "continued", 0, lambda _: run())


def _changes_nothing(
    loaded: LoadedModel, what: str, width: int, run: Callable[[int], Pair]
) -> bool:
    """Whether both logits of a pair agree up to rounding; measured once per model and width."""
    batch = BATCH.get()
    with nullcontext() if batch is None else batch.turn(what):
        return _measured(loaded, what, width, run)


def _measured(loaded: LoadedModel, what: str, width: int, run: Callable[[int], Pair]) -> bool:
    widths = _neutral_widths.setdefault(loaded.model, {})
    config = loaded.model.config.get_text_config()
    chosen = [n for n in (getattr(config, name, None) for name in _CHOSEN_KEYS) if n is not None]
    if chosen and width > min(chosen):
        widths[what] = -1  # keys are chosen among all that are there, and a test may not show it
    if what in widths and not 0 <= widths[what] < width:
        return widths[what] >= 0
    try:
        with torch.no_grad():
            same = _same(*run(width), loaded.model.dtype)
    except _FAILURES as error:
        if is_out_of_memory(error):
            return False
        same = False
    widths[what] = width if same else -1
    return same


def _same(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    a, b = (x.float().log_softmax(-1).clamp_min(LEAST_LOGPROB) for x in (one, other))
    differences = (a - b).abs().mean(-1) / a.std(-1).clamp_min(1e-3)
    return bool((differences <= TOLERANCE.get(dtype, TOLERANCE[torch.float32])).all())


def _pads(loaded: LoadedModel, length: int, width: int) -> int:
    """Number of pads up to `width` tokens, and at least `PADS` where the context allows them."""
    limit = context_limit(loaded.model.config)
    pads = max(width - length, PADS)
    return max(1, pads if limit is None else min(pads, limit - length))


def _logits(loaded: LoadedModel, ids: Tensor, length: int, **kwargs: Any) -> Tensor:
    """Logits [P, V] at the last of the first `length` tokens of row 0, `COMPARED` at most."""
    compared = torch.arange(max(0, length - COMPARED), length)
    with head_at(output_head(loaded.model), torch.zeros_like(compared), compared):
        logits: Tensor = loaded.model(input_ids=ids, **{"use_cache": False, **kwargs}).logits
    return logits[0]
