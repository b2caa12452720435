"""The in-process engine: a loaded transformers model, on one device or several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abliterator.anatomy import Anatomy, anatomy_of
from abliterator.bake import preview_edit
from abliterator.checkpoint import Checkpoint
from abliterator.engines._edits import Edit, Steering, StreamEdit, WriterEdit
from abliterator.engines._generate import generate, stop_ids, stream
from abliterator.engines._hidden import hidden_states
from abliterator.engines._logits import log_likelihoods, logits_along
from abliterator.engines._protocol import (
    Answer,
    AnswerPath,
    OnBatch,
    Padding,
    Tokens,
)
from abliterator.engines._sampling import Sampling
from abliterator.engines._side_by_side import EditsByRow, edited_by_row
from abliterator.model import (
    Limits,
    LoadedModel,
    block_paths,
    hooked,
    in_each_stream,
    limits_of,
    residual_paths,
)
from abliterator.subspace import removal_of_basis

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TransformersEngine:
    """A loaded model as an `Engine`; its methods are documented there.

    Attributes:
        loaded: the model; its weights never change.
    """

    loaded: LoadedModel

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.loaded.tokenizer

    @property
    def limits(self) -> Limits:
        """Context length and vocabulary of the model."""
        return limits_of(self.loaded)

    @property
    def stop_ids(self) -> Tokens:
        """Token ids that end an answer."""
        return stop_ids(self.loaded)

    @property
    def hidden_shape(self) -> tuple[int, int]:
        """(n_layers, d_model)."""
        return len(self.blocks), self.loaded.model.config.get_text_config().hidden_size

    @cached_property
    def blocks(self) -> list[str]:
        """Module paths of all blocks, in order."""
        return block_paths(self._anatomy.blocks, self._anatomy.n_layers)

    @cached_property
    def residuals(self) -> list[tuple[str, ...]]:
        """By residual layer, from 1: paths of the modules whose outputs add up to it."""
        return residual_paths(self.loaded.model, self._anatomy)

    @cached_property
    def _anatomy(self) -> Anatomy:
        return anatomy_of(Checkpoint.open(self.loaded.folder).config)

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
        """The residual stream of every prompt at some positions of every layer."""
        return hidden_states(
            self.loaded,
            prompts,
            residuals=self.residuals,
            positions=positions,
            padding=padding,
            max_batch_tokens=max_batch_tokens,
            share_prefix=share_prefix,
            skipped=skipped,
        )

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
        """Answers, one a prompt."""
        return generate(
            self.loaded,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            stop_ids=self.stop_ids if stop_ids is None else stop_ids,
            share_prefix=share_prefix,
            sampling=sampling,
            answered=answered,
            on_batch=on_batch,
        )

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        on_text: Callable[[str], None],
        on_end: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        """Generates the answer to one prompt, and passes it to `on_text` piece by piece."""
        stream(
            self.loaded,
            prompt,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids,
            on_text=on_text,
            on_end=on_end,
        )

    def logits(
        self,
        paths: Sequence[AnswerPath],
        *,
        max_batch_tokens: int,
        share_prefix: bool = False,
        on_batch: OnBatch | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Next-token logits along given answers."""
        return logits_along(
            self.loaded,
            paths,
            max_batch_tokens=max_batch_tokens,
            share_prefix=share_prefix,
            on_batch=on_batch,
        )

    def log_likelihoods(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Tokens],
        *,
        max_batch_tokens: int,
        together: bool = False,
    ) -> Tensor:
        """[N, C] log-probabilities of each continuation after each prompt."""
        return log_likelihoods(
            self.loaded,
            prompts,
            continuations,
            max_batch_tokens=max_batch_tokens,
            together=together,
        )

    def edited(self, edit: Edit) -> AbstractContextManager[None]:
        """The model under an edit, as long as the context is open."""
        if isinstance(edit, WriterEdit):
            return preview_edit(self.loaded, edit.plan, edit.basis, edit.strengths)
        if isinstance(edit, StreamEdit):
            remove = self._stream_removal(edit)
            return hooked(self.loaded.model, dict.fromkeys(self.blocks, remove))
        return hooked(self.loaded.model, {self.blocks[edit.layer - 1]: self._addition(edit)})

    def edited_side_by_side(
        self, edits: Sequence[Edit], *, max_batch_tokens: int
    ) -> AbstractContextManager[EditsByRow]:
        """The model under several edits of one kind at once, one edit a row of each batch."""
        return edited_by_row(
            self.loaded,
            self.blocks,
            edits,
            max_batch_tokens=max_batch_tokens,
            rows_axis=self._anatomy.rows_axis,
        )

    def _stream_removal(self, edit: StreamEdit) -> Callable[[Tensor], Tensor]:
        """The function h - alpha Q Qᵀ h, computed in float32 at least and rounded once."""
        wide = torch.promote_types(self.loaded.model.dtype, torch.float32)
        removal = removal_of_basis(edit.basis)
        removal_on = cache(lambda device: removal.to(wide, device))

        def remove(hidden: Tensor) -> Tensor:
            stream = hidden.to(wide)
            removed = removal_on(hidden.device).removed(stream)
            return (stream - edit.alpha * removed).to(hidden.dtype)

        return lambda hidden: in_each_stream(hidden, len(edit.basis), remove)

    def _addition(self, edit: Steering) -> Callable[[Tensor], Tensor]:
        """The function h + r; gradients flow to r."""
        direction, width = edit.direction.to(self.loaded.model.dtype), len(edit.direction)

        @cache
        def direction_on(device: torch.device) -> Tensor:
            # whether or not the first pass records any gradients
            with torch.inference_mode(mode=False), torch.enable_grad():
                return direction.to(device)

        return lambda h: in_each_stream(h, width, lambda s: s + direction_on(s.device))
