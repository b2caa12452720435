"""How a model's own refusals begin, and how likely it is to begin like that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from abliterator.model import (
    ByRow,
    LoadedModel,
    Prefix,
    cache_is_continued,
    equal_length_batches,
    run_batches,
)
from abliterator.selection._forced import last_logprobs, shared_prefix

Tokens = tuple[int, ...]

LONGEST = 6  # tokens of an opening: "I'm sorry, but I" and the like
MOST = 3  # openings
LEAST_SHARE = 0.05  # of the refusals, beyond other answers: a rarer opening may be chance
# float32 cannot tell a probability from 1 beyond this, and one prompt must not outweigh the others
FARTHEST = 14.0  # log-odds


def learn_openings(
    refusals: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
) -> tuple[Tokens, ...]:
    """The openings that refusals have and other answers lack, the most telling first.

    Greedy: the opening whose share among refusals exceeds its share among other answers most (the
    shorter of equals), then the same for the refusals that it does not cover.

    Args:
        refusals: token ids of answers that refuse.
        others: token ids of answers that do not.

    Returns:
        Up to three token sequences, none the beginning of another; none where refusals begin as
        other answers do.
    """
    left = [tuple(answer[:LONGEST]) for answer in refusals]
    found: list[Tokens] = []

    def worth(opening: Tokens) -> float:
        return _count(left, opening) / len(refusals) - _count(others, opening) / max(1, len(others))

    while left and len(found) < MOST:
        beginnings = {a[:n] for a in left for n in range(1, len(a) + 1)}
        allowed = [o for o in beginnings if not any(f[: len(o)] == o for f in found)]
        best = max(allowed, key=lambda o: (worth(o), -len(o), o), default=None)
        if best is None or worth(best) < LEAST_SHARE:
            break
        found.append(best)
        left = [answer for answer in left if answer[: len(best)] != best]
    return tuple(found)


def _count(answers: Sequence[Sequence[int]], opening: Tokens) -> int:
    return sum(tuple(answer[: len(opening)]) == opening for answer in answers)


def refusal_scores(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    openings: Sequence[Tokens],
    *,
    max_batch_tokens: int,
    by_row: ByRow | None = None,
) -> Tensor:
    """Log-odds that the answer to each prompt begins with one of `openings`.

    log(p / (1 - p)), p the sum of the openings' probabilities: Arditi et al. (2024), section B, for
    openings of several tokens. `by_row` has the intervention of each prompt, where they run under
    several; what all prompts begin with is run once for each.

    Returns:
        [N] float64.
    """
    found: dict[int, Tensor] = {}
    prefix = shared_prefix(loaded, prompts, by_row)
    rest = [prompt[prefix.length :] for prompt in prompts]
    batches = equal_length_batches(rest, max_batch_tokens)
    run = partial(_log_likelihoods, loaded, rest, openings, prefix)
    for batch, rows in run_batches(batches, run):
        found.update(zip(batch, rows, strict=True))
    log_p = torch.stack([found[i] for i in range(len(prompts))]).logsumexp(dim=1)
    others = (-torch.expm1(log_p)).clamp_min(torch.finfo(torch.float64).tiny)
    return (log_p - others.log()).clamp(-FARTHEST, FARTHEST)


def _log_likelihoods(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    openings: Sequence[Tokens],
    prefix: Prefix,
    batch: list[int],
) -> Tensor:
    """[len(batch), openings] log-probabilities, float64; prompts in the batch have one length.

    The prompts run once: every opening continues a copy of their cache, where the model can.
    """
    ids = torch.tensor([list(prompts[i]) for i in batch], device=loaded.device)
    start = prefix.length
    first, cache = last_logprobs(loaded, ids, keep=1, cache=prefix.enter(batch), start=start)

    def continued(given: Tensor) -> Tensor:
        own, at = copy.deepcopy(cache), start + ids.shape[1]
        return last_logprobs(loaded, given, keep=given.shape[1], cache=own, start=at)[0]

    def whole(given: Tensor) -> Tensor:
        rows, own = torch.cat([ids, given], dim=1), prefix.enter(batch)
        return last_logprobs(loaded, rows, keep=given.shape[1], cache=own, start=start)[0]

    columns = []
    for opening in openings:
        column = first[:, -1, opening[0]].double()
        if len(opening) > 1:
            given = torch.tensor([opening[:-1]] * len(batch), device=loaded.device)
            able = cache is not None and cache_is_continued(
                loaded, partial(_both, whole, continued, given)
            )
            after = continued(given) if able else whole(given)
            steps, tokens = torch.arange(len(opening) - 1), torch.tensor(opening[1:])
            column = column + after[:, steps, tokens].double().sum(dim=1)
        columns.append(column)
    return torch.stack(columns, dim=1)


def _both(
    whole: Callable[[Tensor], Tensor], continued: Callable[[Tensor], Tensor], given: Tensor
) -> tuple[Tensor, Tensor]:
    return whole(given), continued(given)
