"""Openings of a model's refusals, and the log-odds that an answer begins with one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abliterator.engines import Tokens

LONGEST = 6  # tokens of an opening: "I'm sorry, but I" and the like
MOST = 3  # openings
LEAST_SHARE = 0.05  # of the refusals, beyond other answers: a rarer opening may be chance
FARTHEST = 14.0
"""The largest log-odds of `log_odds`, and minus the least.

Beyond it float32 cannot distinguish a probability from 1, and one prompt would dominate means.
"""


def learn_openings(
    refusals: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
) -> tuple[Tokens, ...]:
    """The openings that refusals have and other answers lack, the most distinctive first.

    Greedy: the opening whose share among refusals exceeds its share among other answers most (the
    shorter of equals), then the same for the refusals that it does not cover.

    Args:
        refusals: token ids of answers that refuse.
        others: token ids of answers that do not.

    Returns:
        Up to three token sequences, none the beginning of another; none where refusals begin as
        other answers do.
    """
    uncovered = [tuple(answer[:LONGEST]) for answer in refusals]
    openings: list[Tokens] = []

    def share_gain(opening: Tokens) -> float:
        return _count(uncovered, opening) / len(refusals) - _count(others, opening) / max(
            1, len(others)
        )

    while uncovered and len(openings) < MOST:
        beginnings = {a[:n] for a in uncovered for n in range(1, len(a) + 1)}
        allowed = [o for o in beginnings if not any(f[: len(o)] == o for f in openings)]
        best = max(allowed, key=lambda o: (share_gain(o), -len(o), o), default=None)
        if best is None or share_gain(best) < LEAST_SHARE:
            break
        openings.append(best)
        uncovered = [answer for answer in uncovered if answer[: len(best)] != best]
    return tuple(openings)


def _count(answers: Sequence[Sequence[int]], opening: Tokens) -> int:
    return sum(tuple(answer[: len(opening)]) == opening for answer in answers)


def log_odds(log_likelihoods: Tensor) -> Tensor:
    """Log-odds that an answer begins with one of several openings.

    log(p / (1 - p)), p the sum of the openings' probabilities: Arditi et al. (2024), section B, for
    openings of several tokens.

    Args:
        log_likelihoods: [..., C] float64, of each opening after each prompt (`Engine`).

    Returns:
        [...] float64, at most `FARTHEST` from 0.
    """
    log_p = log_likelihoods.logsumexp(dim=-1)
    complement = (-torch.expm1(log_p)).clamp_min(torch.finfo(torch.float64).tiny)
    return (log_p - complement.log()).clamp(-FARTHEST, FARTHEST)
