"""The protocol of an engine, and its results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from abliterator.engines._edits import Edit
from abliterator.engines._sampling import Sampling
from abliterator.record import FinishReason

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from abliterator.model import Limits

Tokens = tuple[int, ...]
Padding = Literal["none", "left"]
OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: decoded without special tokens; before it, the model's thinking with them.
        token_ids: what was generated, without the stop token.
        finish_reason: "stop" if a stop token ended it, "length" if max_new_tokens did.
        start: where the answer begins in `text`, after the thinking; at its end where the model
            had not begun to answer.
        start_token: the same in `token_ids`.
    """

    text: str
    token_ids: Tokens
    finish_reason: FinishReason
    start: int = 0
    start_token: int = 0


class AnswerPath(NamedTuple):
    """A prompt with an answer to it, and how many of its last positions are compared.

    The first of those positions predicts the first compared token of the answer.
    """

    token_ids: Tokens
    positions: int

    @property
    def prompt(self) -> Tokens:
        """The tokens up to the one that predicts the first compared token."""
        return self.token_ids[: len(self.token_ids) - self.positions + 1]


class Engine(Protocol):
    """A model that computes hidden states, answers and distributions.

    Every method works under the edit that is in force (`edited`), if any. Prompts are
    token ids; results come in the order of the prompts unless a method says otherwise.
    """

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, chat template included."""

    @property
    def limits(self) -> Limits:
        """Tokens that the model reads at most, and its vocabulary."""

    @property
    def stop_ids(self) -> Tokens:
        """Token ids that end an answer: of generation_config, config and tokenizer together."""

    @property
    def hidden_shape(self) -> tuple[int, int]:
        """(n_layers, d_model) of the residual stream."""

    def hidden_states(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        positions: Sequence[int] = (-1,),
        padding: Padding = "none",
        max_batch_tokens: int = 4096,
        share_prefix: bool = False,
        skipped: Collection[int] = (),
    ) -> Iterator[tuple[list[int], Tensor]]:
        """The residual stream of every prompt at some positions of every layer, batch by batch.

        Args:
            prompts: at least one.
            positions: P of them, counted from the end of each prompt: -1 is its last token.
            padding: "none" batches prompts of equal length; "left" pads in batches of mixed length.
            max_batch_tokens: tokens in a batch, padding included.
            share_prefix: run the tokens with which all prompts begin once, not once a prompt, where
                the model's cache can be continued. They do not count in `max_batch_tokens`; the
                last bits change.
            skipped: indices of prompts that are not run; the others run in the same batches.

        Raises:
            DirectionError: without prompts, and for a prompt with no token at a position.
            PromptError: for a prompt that is longer than what the model reads.
            CheckpointError: for tokens that the model has no embedding of.

        Yields:
            The indices of a batch's prompts, and their residuals [N, P, n_layers, d_model] in the
            dtype of the model, on its device; layer l (from 1) is the output of block l - 1.
        """

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        batch_size: int | None = None,
        stop_ids: Sequence[int] | None = None,
        share_prefix: bool = False,
        sampling: Sampling | None = None,
        answered: MutableMapping[int, Answer] | None = None,
        on_batch: OnBatch | None = None,
    ) -> list[Answer]:
        """Answers, one a prompt: greedy ones unless `sampling` says otherwise.

        Args:
            prompts: none may be empty.
            max_new_tokens: at most this many tokens an answer.
            batch_size: prompts at a time; without a number as many as a GPU's memory holds, and on
                other devices 16.
            stop_ids: tokens that end an answer; the model's own unless given.
            share_prefix: run the tokens with which all prompts begin once, not once a prompt. The
                same answers but for rounding: two tokens that nearly tie may change places.
            sampling: draws the answers. In process the same seed gives the same answers whatever
                the batches, up to the rounding of logits; a server draws by its own rules.
            answered: answers by index of an earlier call with the same arguments that was
                interrupted: those prompts are not run again, and the others in the same batches.
                Each batch's answers are added by `update`, which may write them to a disk.
            on_batch: called with the number of prompts done after each batch.

        Raises:
            GenerationError: for an empty prompt, when one prompt alone does not fit in memory, and
                for logits that are NaN or infinite.
            PromptError: for a prompt that with its answer is longer than what the model reads.
            CheckpointError: for tokens that the model has no embedding of.
        """

    def logits(
        self,
        paths: Sequence[AnswerPath],
        *,
        max_batch_tokens: int,
        share_prefix: bool = False,
        on_batch: OnBatch | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Next-token logits along given answers, path by path.

        Yields:
            In the order of the batches, which is the same in every call with the same paths: the
            index of a path, and [positions, V] logits in the model's dtype on the CPU.
        """

    def log_likelihoods(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Tokens],
        *,
        max_batch_tokens: int,
        together: bool = False,
    ) -> Tensor:
        """[N, C] float64 log-probabilities of each of C continuations after each prompt, nats.

        Args:
            prompts: token ids.
            continuations: token ids, none empty.
            max_batch_tokens: tokens in a batch.
            together: run what continues a prompt as rows of one batch. The same numbers but for
                rounding.
        """

    def edited(self, edit: Edit) -> AbstractContextManager[None]:
        """The model under an edit, as long as the context is open."""

    def edited_side_by_side(
        self, edits: Sequence[Edit], *, max_batch_tokens: int
    ) -> AbstractContextManager[SideBySide]:
        """The model under several edits of one kind at once, one edit a row of each batch."""


class SideBySide(Protocol):
    """A model under `n` edits at once: each method runs every prompt under every edit.

    Equal to one edit at a time up to the rounding of other batches.
    """

    @property
    def n(self) -> int:
        """How many edits there are."""

    def answers(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int | None
    ) -> list[list[Answer]]:
        """Greedy answers to `prompts`, for each edit."""

    def logits(self, paths: Sequence[AnswerPath]) -> Iterator[tuple[int, int, Tensor]]:
        """Logits along given answers: edit, index of the path, [positions, V] on the CPU."""

    def log_likelihoods(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Tokens]
    ) -> Tensor:
        """[n, N, C] float64 log-probabilities of each continuation after each prompt, nats."""
