"""How a model's own refusals begin, and how likely it is to begin like that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abliterator.engines import Tokens

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
    openings: list[Tokens] = []

    def worth(opening: Tokens) -> float:
        return _count(left, opening) / len(refusals) - _count(others, opening) / max(1, len(others))

    while left and len(openings) < MOST:
        beginnings = {a[:n] for a in left for n in range(1, len(a) + 1)}
        allowed = [o for o in beginnings if not any(f[: len(o)] == o for f in openings)]
        best = max(allowed, key=lambda o: (worth(o), -len(o), o), default=None)
        if best is None or worth(best) < LEAST_SHARE:
            break
        openings.append(best)
        left = [answer for answer in left if answer[: len(best)] != best]
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
    others = (-torch.expm1(log_p)).clamp_min(torch.finfo(torch.float64).tiny)
    return (log_p - others.log()).clamp(-FARTHEST, FARTHEST)
