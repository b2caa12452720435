"""Seconds and bytes of forward passes and of greedy answers.

A forward pass multiplies every token with the parameters of the blocks, 2 N FLOPs a token (Kaplan
et al. 2020, section 2.1), at the measured rate of products of these shapes. For few rows that rate
is the one at which matrices are read, which is what decoding waits for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from abliterator.costs._machine import Machine
from abliterator.costs._rows import cache_bytes
from abliterator.costs._shape import Matrix, ModelShape, dtype_bytes

# Reads and writes of keys and values in a step of decoding: a cache that grows is copied, and keys
# of grouped heads are repeated.
_CACHE_COPIES = 4
# Reads and writes of logits in a step: checked, converted to float32, and the largest found.
_LOGIT_COPIES = 4
# Writes to new memory of a number of the weights that is read from disk for a pass, by accelerate's
# hooks and block by block: measured with SmolLM2, by this process's seconds.
_PLACED_COPIES, _STREAMED_COPIES = 0.7, 0.85
_TOGETHER = 256  # batches for which a block is read once (`abliterator.engines`)


@dataclass(frozen=True)
class Work:
    """A model on a machine: what passes and answers cost there.

    Attributes:
        shape: of the model.
        machine: its rates.
        on_disk: bytes of weights that every pass reads from disk, unless it is streamed.
        streams: whether `scores` reads the weights block by block, once for all prompts.
    """

    shape: ModelShape
    machine: Machine
    on_disk: int = 0
    streams: bool = False

    @property
    def number_bytes(self) -> float:
        """Bytes of a number in the dtype of computation."""
        return dtype_bytes(self.machine.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights while the model runs."""
        return int(self.shape.parameters * self.number_bytes)

    def forward(self, rows: int, tokens: float, *, cached: float = 0, logits: float = 0) -> float:
        """Seconds of one forward pass.

        Args:
            rows: sequences.
            tokens: new ones of each.
            cached: tokens of each whose keys and values are kept from before.
            logits: positions at which the output head runs, in all rows together.
        """
        shape, machine = self.shape, self.machine
        n = rows * tokens
        products = sum(self._product(matrix, n) for matrix in shape.matrices)
        products += machine.product_seconds(logits, shape.d_model, shape.vocabulary)
        stream = machine.stream * n * shape.d_model * shape.n_layers
        computed = (
            products
            + stream
            + cache_bytes(shape, rows, cached, self.number_bytes)
            * (_CACHE_COPIES / machine.bandwidth)
        )
        overhead = machine.pass_overhead + shape.n_layers * machine.block_overhead
        # an accelerator computes while the next call is prepared
        return max(computed, overhead) if machine.accelerator else computed + overhead

    def read_again(self, passes: float = 1) -> float:
        """Seconds in which passes of a placed model read the weights that lie on disk."""
        machine = self.machine
        return passes * self.on_disk * (1 / machine.uncached_read + _PLACED_COPIES / machine.fresh)

    def streamed(self, batches: int) -> float:
        """Seconds in which all weights are read block by block for so many batches."""
        machine = self.machine
        copied = _STREAMED_COPIES * self.weight_bytes / machine.fresh
        return math.ceil(batches / _TOGETHER) * (self.shape.stored / machine.uncached_read + copied)

    def answers(
        self,
        prompts: int,
        prompt_tokens: float,
        new_tokens: int,
        batch_size: int,
        *,
        shared: float = 0.0,
    ) -> float:
        """Seconds of greedy answers, each batch up to its longest answer.

        Args:
            prompts: that are answered.
            prompt_tokens: of each, its chat template included.
            new_tokens: of the longest answer of a batch.
            batch_size: prompts at a time.
            shared: tokens with which all prompts begin, where they run once.
        """
        whole, rest = divmod(prompts, batch_size)
        sizes = [(batch_size, whole), (rest, 1)] if rest else [(batch_size, whole)]
        seconds = 0.0
        for rows, batches in sizes:
            first = self.forward(rows, prompt_tokens - shared, cached=shared, logits=rows)
            kept = prompt_tokens + new_tokens / 2
            step = self.forward(rows, 1, cached=kept, logits=rows) + self._step(rows)
            seconds += batches * (first + (new_tokens - 1) * step + self.read_again(new_tokens))
        return seconds + (self.forward(1, shared) + self.read_again() if shared else 0.0)

    def scores(self, lengths: Sequence[int], max_tokens: int, *, positions: int = 0) -> float:
        """Seconds of prompts in batches of one length, with logits at the last positions of each.

        Args:
            lengths: tokens of each prompt.
            max_tokens: of one batch.
            positions: of each prompt that get logits.
        """
        seconds, batches = 0.0, 0
        for length in sorted(set(lengths)):
            n, rows = lengths.count(length), max(1, max_tokens // max(1, length))
            for size in (*([rows] * (n // rows)), *([n % rows] if n % rows else [])):
                seconds += self.forward(size, length, logits=size * positions)
                batches += 1
        read = self.streamed(batches) if self.streams else self.read_again(batches)
        return seconds + read + len(lengths) * positions * self.logit_seconds()

    def logit_seconds(self, copies: int = _LOGIT_COPIES) -> float:
        """Seconds of so many reads and writes of the logits of one position, in float32."""
        return copies * 4 * self.shape.vocabulary / self.machine.bandwidth

    def _step(self, rows: int) -> float:
        return self.machine.step_overhead + rows * self.logit_seconds()

    def _product(self, matrix: Matrix, tokens: float) -> float:
        """Seconds of all matrices of a kind; of experts, those that tokens are sent to."""
        if not matrix.expert or not self.shape.experts:
            return matrix.count * self.machine.product_seconds(tokens, matrix.inner, matrix.outer)
        sent = tokens * self.shape.active
        # of E experts, those that any of so many choices meets
        reached = self.shape.experts * (1 - math.pow(1 - 1 / self.shape.experts, sent))
        share = reached / self.shape.experts
        rows = sent / max(1.0, reached)
        return (
            share
            * matrix.count
            * self.machine.product_seconds(max(1.0, rows), matrix.inner, matrix.outer)
        )


def spread(mean: float, n: int) -> list[int]:
    """Lengths of `n` prompts about a mean, where the prompts themselves are not at hand.

    Evenly over a quarter of the mean to both sides, as instructions of one data set are.
    """
    low, high = math.floor(0.75 * mean), math.ceil(1.25 * mean)
    return [low + i * max(1, high - low) // max(1, n) for i in range(n)]
