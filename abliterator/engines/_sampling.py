"""Answers drawn at a temperature, each by random numbers of its own.

The Gumbel-max trick (Gumbel 1954; Maddison, Tarlow & Minka 2014, arXiv:1411.0030): the token with
the largest log-probability plus Gumbel noise is a draw from the distribution. The noise is a
function of the seed, the prompt's tokens, the number of the answer, the step and the token, so an
answer depends neither on its batch nor on what was drawn before. Base and edited model get the same
noise, and differ where their distributions do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterator.files import digest_of

_BITS = 52  # of a uniform number: k + 1/2 is exact in float64, and none is 0 or 1


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: divides the logits; above 0.
        top_p: tokens are drawn from the smallest set of likeliest ones with this probability.
        seed: of all random numbers.
        sample: number of the answer, where a prompt gets several.
    """

    temperature: float
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0

    def seed_of(self, prompt: Sequence[int]) -> int:
        """The seed of one answer: 63 bits, whatever batch, order or process it is drawn in."""
        return int(digest_of([self.seed, self.sample, list(prompt)])[:16], 16) >> 1

    def drawing(
        self, prompts: Sequence[Sequence[int]], width: int
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A processor for transformers' greedy search that leaves the drawn tokens alone possible.

        Args:
            prompts: token ids of each row.
            width: tokens before the answers, padding included.
        """
        seeds = torch.tensor([self.seed_of(prompt) for prompt in prompts])

        def draw(ids: Tensor, logits: Tensor) -> Tensor:
            tokens = self._draw(logits, seeds, ids.shape[1] - width)
            only = torch.full_like(logits, -torch.inf)
            return only.scatter_(1, tokens[:, None].to(logits.device), 0.0)

        return draw

    def _draw(self, logits: Tensor, seeds: Tensor, step: int) -> Tensor:
        """A token of each row [N] of `logits` [N, V], computed in float64."""
        from transformers import TopPLogitsWarper

        if logits.device.type == "mps":  # has no float64
            logits = logits.cpu()
        scores = logits.double() / self.temperature
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        size = scores.shape[1]
        noise = gumbel_noise(seeds.to(scores.device), step * size, size)
        return (scores + noise).argmax(dim=1)


def gumbel_noise(seeds: Tensor, start: int, n: int) -> Tensor:
    """Standard Gumbel numbers [rows, n] in float64: those from `start` on of each seed's sequence.

    Args:
        seeds: int64 [rows].
        start: numbers of each sequence that are passed over.
        n: how many.
    """
    bits = split_mix(seeds, start, n)
    uniform = (_shifted(bits, 64 - _BITS).double() + 0.5) * 2.0**-_BITS
    return -torch.log(-torch.log(uniform))


def split_mix(seeds: Tensor, start: int, n: int) -> Tensor:
    """Outputs `start` to `start + n` of SplitMix64 [rows, n], as int64 with the same bits.

    SplitMix64 mixes the seed plus a multiple of a constant, so that any output is computed alone
    (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195).
    """
    counters = torch.arange(start + 1, start + n + 1, device=seeds.device)
    state = seeds[:, None] + counters * _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Int64 bits shifted right, with zeros from the left."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(bits: int) -> int:
    """The int64 with the bits of an unsigned number; products of int64 wrap, as they must here."""
    return bits - (1 << 64) if bits >> 63 else bits
