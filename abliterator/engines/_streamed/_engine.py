"""The engine that reads weights block by block, for models that fit in no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from abliterator.devices import CPU, device_memory, release_memory
from abliterator.engines._edits import Edit
from abliterator.engines._protocol import Answer, AnswerPath, OnBatch, Padding, SideBySide, Tokens
from abliterator.engines._sampling import Sampling
from abliterator.engines._streamed._passes import Passes
from abliterator.engines._streamed._weights import PartialWeights
from abliterator.engines._transformers import TransformersEngine
from abliterator.errors import GenerationError
from abliterator.model import Limits, LoadedModel, load_without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Share of the host's free memory for hidden states of batches that wait; more are on disk.
ACTIVATIONS_SHARE = 0.25

Place = Callable[[], LoadedModel]


@dataclass
class StreamedEngine:
    """A model as an `Engine` that reads its weights block by block, once for all prompts of a call.

    Hidden states, logits and log-probabilities are those of `TransformersEngine`, bit by bit on a
    CPU: the model's own code runs the same batches. Each call reads the weights again: ask for many
    prompts at once. Answers, which need every weight for every token, are the placed model's.

    Attributes:
        streamed: the engine of the model without weights.
        passes: how its batches run.
        place: loads the same model for answers, in memory and on disk; None where there is no such.
    """

    streamed: TransformersEngine
    passes: Passes
    place: Place | None = None
    _placed: LoadedModel | None = None
    # others may still hold it, and then it is not loaded twice
    _last_placed: Callable[[], LoadedModel | None] = field(default=lambda: None)
    _edits: list[Edit] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the model lies."""
        return self.streamed.loaded.folder

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.streamed.tokenizer

    @property
    def limits(self) -> Limits:
        """Context length and vocabulary of the model."""
        return self.streamed.limits

    @property
    def stop_ids(self) -> Tokens:
        """Token ids that end an answer."""
        return self.streamed.stop_ids

    @property
    def hidden_shape(self) -> tuple[int, int]:
        """(n_layers, d_model)."""
        return self.streamed.hidden_shape

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
        self._drop_placed()
        return self.streamed.hidden_states(
            prompts,
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
        """Answers of the placed model.

        Raises:
            GenerationError: without such a model, or as `Engine.answers`.
        """
        with self._placed_and_edited() as placed:
            return placed.answers(
                prompts,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                stop_ids=stop_ids,
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
        """The placed model's answer to one prompt, passed to `on_text` piece by piece."""
        with self._placed_and_edited() as placed:
            placed.stream(prompt, max_new_tokens=max_new_tokens, on_text=on_text, on_end=on_end)

    def logits(
        self,
        paths: Sequence[AnswerPath],
        *,
        max_batch_tokens: int,
        share_prefix: bool = False,
        on_batch: OnBatch | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Next-token logits along given answers."""
        self._drop_placed()
        return self.streamed.logits(
            paths, max_batch_tokens=max_batch_tokens, share_prefix=share_prefix, on_batch=on_batch
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
        self._drop_placed()
        return self.streamed.log_likelihoods(
            prompts, continuations, max_batch_tokens=max_batch_tokens, together=together
        )

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """The model under an edit, as long as the context is open."""
        with self.streamed.edited(edit):
            self._edits.append(edit)
            try:
                yield
            finally:
                self._edits.pop()

    @contextmanager
    def edited_side_by_side(
        self, edits: Sequence[Edit], *, max_batch_tokens: int
    ) -> Iterator[SideBySide]:
        """The model under several edits of one kind at once, one edit a row of each batch."""
        with self.streamed.edited_side_by_side(edits, max_batch_tokens=max_batch_tokens) as rows:
            yield _SideBySide(self, rows, edits, max_batch_tokens)

    def placed(self) -> TransformersEngine:
        """The same model placed in memory and on disk, loaded when it is first needed.

        Raises:
            GenerationError: if there is no such model.
        """
        if self.place is None:
            raise GenerationError(
                f"The model in {self.folder} is read block by block, and its answers would need "
                "all of it for every token. This model's answers come from an engine: set "
                "`engine:` in the recipe (vllm or server)."
            )
        self._placed = self._placed or self._last_placed() or self.place()
        self._last_placed = weakref.ref(self._placed)
        return TransformersEngine(self._placed)

    @contextmanager
    def _placed_and_edited(self) -> Iterator[TransformersEngine]:
        """The placed model under the edits in force."""
        placed = self.placed()
        with ExitStack() as stack:
            for edit in self._edits:
                stack.enter_context(placed.edited(edit))
            yield placed

    def _drop_placed(self) -> None:
        """Frees the placed model: it fills the memory that hidden states need."""
        if self._placed is not None:
            self._placed = None
            release_memory()


@dataclass(frozen=True)
class _SideBySide:
    """Several edits at once (`SideBySide`): passes are streamed, answers the placed model's."""

    engine: StreamedEngine
    streamed: SideBySide
    edits: Sequence[Edit]
    max_batch_tokens: int

    @property
    def n(self) -> int:
        """How many edits there are."""
        return self.streamed.n

    def answers(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int | None
    ) -> list[list[Answer]]:
        """Greedy answers to `prompts`, for each edit."""
        with (
            self.engine._placed_and_edited() as placed,
            placed.edited_side_by_side(
                self.edits, max_batch_tokens=self.max_batch_tokens
            ) as side_by_side,
        ):
            return side_by_side.answers(
                prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
            )

    def logits(self, paths: Sequence[AnswerPath]) -> Iterator[tuple[int, int, Tensor]]:
        """Logits along given answers: edit, index of the path, [positions, V] on the CPU."""
        self.engine._drop_placed()
        return self.streamed.logits(paths)

    def log_likelihoods(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Tokens]
    ) -> Tensor:
        """[n, N, C] float64 log-probabilities of each continuation after each prompt, nats."""
        self.engine._drop_placed()
        return self.streamed.log_likelihoods(prompts, continuations)


def open_streamed(
    folder: Path,
    *,
    device: str,
    dtype: str | None,
    place: Place | None = None,
    trust_remote_code: bool = False,
    activation_bytes: int | None = None,
    scratch: Path | None = None,
) -> StreamedEngine:
    """An engine of the model in `folder` that reads its weights block by block.

    Args:
        folder: a checkpoint in safetensors format.
        device: what computes; "auto" is the first accelerator, or the CPU.
        dtype: "float32", "bfloat16" or "float16"; None is the dtype that config.json says.
        place: loads the same model for answers.
        trust_remote_code: whether the config may be read with Python files in `folder`.
        activation_bytes: of hidden states in host memory; None is a share of what is free.
        scratch: folder of the file with further ones; None is the system's.

    Raises:
        UnsupportedModel: for a model that has to be loaded whole.
        CheckpointError: if weights are missing.
    """
    if activation_bytes is None:
        activation_bytes = int(ACTIVATIONS_SHARE * device_memory(CPU).free)
    loaded = load_without_weights(
        folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    weights = PartialWeights(loaded, TransformersEngine(loaded).blocks)
    passes = Passes(loaded, weights, memory=activation_bytes, folder=scratch)
    together = replace(loaded, run_batches=passes.run_batches)
    return StreamedEngine(TransformersEngine(together), passes, place)
