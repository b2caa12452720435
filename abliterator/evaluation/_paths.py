"""Distributions of base and edited along the base's own answers.

The base's logits go to a file in its own dtype, without loss; at most one batch of base and edited
is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from abliterator.engines import AnswerPath, Engine, Tokens
from abliterator.errors import GenerationError, OutputError
from abliterator.evaluation._answers import Bar, no_bar
from abliterator.evaluation._context import EvaluationContext, RenderedPrompts
from abliterator.evaluation._kl import kl_divergence, require_finite, top1_agreement
from abliterator.files import OpenFile, free_bytes, writable, write_fully
from abliterator.record import Divergence, Estimate
from abliterator.statistics import mean_interval


class PathDivergence(NamedTuple):
    """Edited against base at every position of one path: [positions] each, float64 and bool."""

    kl: Tensor
    top1: Tensor


def answer_path(
    prompt: Sequence[int], answer: Sequence[int], *, tokens: int, stopped: bool
) -> AnswerPath:
    """The path of the first `tokens` tokens of an answer.

    Args:
        prompt: token ids.
        answer: token ids of the base's greedy answer, without the stop token.
        tokens: at most so many positions.
        stopped: whether a stop token came next; to stop there is then compared too.
    """
    positions = min(tokens, len(answer) + stopped)
    # the last token that is predicted need not be read
    return AnswerPath((*prompt, *answer[: positions - 1]), positions)


def base_paths(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    max_new_tokens: int,
    batch_size: int | None,
    bar: Bar = no_bar,
    share_prefix: bool = False,
) -> list[AnswerPath]:
    """The model's own greedy answers, along which distributions are compared.

    Of a model that thinks first, the answer is what follows its thinking, which is then part of the
    prompt; prompts on which it does not come to an answer are left out.

    Args:
        engine: the base.
        prompts: token ids, one rendered prompt each.
        tokens: answer tokens compared of each prompt, at most.
        max_new_tokens: of the thinking before them.
        batch_size: prompts at a time.
        bar: shows progress.
        share_prefix: as of `Engine.answers`.

    Raises:
        GenerationError: if there is no prompt, or the model comes to no answer on any.
    """

    def paths_of(prompts: Sequence[Sequence[int]]) -> tuple[list[AnswerPath], bool]:
        with bar("base answers to neutral prompts", len(prompts)) as advance:
            answers = engine.answers(
                prompts,
                max_new_tokens=tokens,
                batch_size=batch_size,
                share_prefix=share_prefix,
                on_batch=advance,
            )
        paths = [
            answer_path(
                prompt, answer.token_ids, tokens=tokens, stopped=answer.finish_reason == "stop"
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return paths, any(answer.start_token for answer in answers)

    paths, thinks = paths_of(prompts)
    if not thinks:
        return paths
    extended = _with_thinking(engine, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return paths_of([prompt for prompt in extended if prompt is not None])[0]


def behind_thinking(context: EvaluationContext, prompts: RenderedPrompts) -> RenderedPrompts:
    """The prompts with the base's thinking, without those on which it does not reach an answer.

    So that the first token that is measured is that of the answer, not of the thinking.
    """
    extended = _with_thinking(
        context.engine,
        prompts.token_ids,
        max_new_tokens=context.max_new_tokens,
        batch_size=context.batch_size,
    )
    with_answer = [
        (p, ids) for p, ids in zip(prompts.prompts, extended, strict=True) if ids is not None
    ]
    return RenderedPrompts([prompt for prompt, _ in with_answer], [ids for _, ids in with_answer])


def _with_thinking(
    engine: Engine, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int | None
) -> list[Tokens | None]:
    """Each prompt with the thinking that the model writes before its answer.

    Returns:
        One a prompt; None where no answer has begun within `max_new_tokens`.

    Raises:
        GenerationError: if that is so for every prompt.
    """
    answers = engine.answers(
        prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, share_prefix=True
    )
    extended = [
        (*prompt, *answer.token_ids[: answer.start_token])
        if answer.start_token < len(answer.token_ids) or not answer.start_token
        else None
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    if prompts and not any(extended):
        raise GenerationError(
            f"The model thinks for longer than {max_new_tokens} tokens on each of {len(prompts)} "
            "prompts, so that there is no answer to measure. Switch thinking off in "
            "`chat.template_kwargs` (often `enable_thinking: false`), or raise "
            "`rollouts.max_new_tokens` and `selection.tokens`."
        )
    return extended


@dataclass
class LogitFile:
    """Logits of the base at every compared position of some paths, in a file that may be large.

    Attributes:
        path: of the file; `with` deletes it at the end.
    """

    path: Path
    _offsets: dict[int, int] = field(default_factory=dict)  # byte offset by index of a path
    _shape: tuple[int, torch.dtype] | None = None  # vocabulary and dtype
    _buffer: bytearray = field(default_factory=bytearray)  # of one path, used again

    def __enter__(self) -> LogitFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)

    def write(self, paths: Sequence[AnswerPath], logits: Iterable[tuple[int, Tensor]]) -> None:
        """Writes the logits of every path, as `Engine.logits` gives them.

        Raises:
            OutputError: if the disk has too little space for them.
            FileError: if the file cannot be written, as when the disk fills up meanwhile.
        """
        with writable(self.path, 0):
            stream = self.path.open("wb", buffering=0)  # nothing is left to be written at the end
        with stream:
            file = OpenFile(self.path, stream, 0)
            offset = 0
            for index, rows in logits:
                if self._shape is None:
                    self._shape = rows.shape[1], rows.dtype
                    file = file._replace(size=_require_room(paths, rows, self.path))
                write_fully(file, rows.contiguous().view(torch.uint8).numpy().data.cast("B"))
                self._offsets[index] = offset
                offset += rows.nbytes

    def compare(
        self, paths: Sequence[AnswerPath], logits: Iterable[tuple[int, Tensor]]
    ) -> list[PathDivergence]:
        """Divergence of the edited model's logits from those that were written, path by path.

        Args:
            paths: those that were written; or all of them once for each of several edits.
            logits: by index among `paths`.

        Returns:
            One for each path, in their order.

        Raises:
            GenerationError: if the two models have other vocabularies or dtypes, or KL is not
                finite.
        """
        # made before the large temporaries: small tensors kept among them fragment memory
        lengths = [path.positions for path in paths]
        kl = torch.split(torch.empty(sum(lengths), dtype=torch.float64), lengths)
        top1 = torch.split(torch.empty(sum(lengths), dtype=torch.bool), lengths)
        with self.path.open("rb", buffering=0) as stream:
            for index, edited in logits:
                base = self._read(stream, index % len(self._offsets), edited)
                divergence = path_divergence(base, edited)
                kl[index].copy_(divergence.kl)
                top1[index].copy_(divergence.top1)
        return [PathDivergence(*fields) for fields in zip(kl, top1, strict=True)]

    def _read(self, stream: FileIO, index: int, like: Tensor) -> Tensor:
        """The base's logits of one path: a view of the buffer, valid until the next call."""
        if (like.shape[1], like.dtype) != self._shape:
            raise GenerationError(
                "Base and edited have distributions of other sizes, so they cannot be compared: "
                "their vocabularies or dtypes differ. Compare a model with an edit of itself, in "
                "one `--dtype`."
            )
        if len(self._buffer) < like.nbytes:
            self._buffer = bytearray(like.nbytes)
        view, n_read = memoryview(self._buffer)[: like.nbytes], 0
        stream.seek(self._offsets[index])
        while n_read < len(view) and (n_new := stream.readinto(view[n_read:])):
            n_read += n_new
        if n_read < len(view):
            raise OutputError(f"{self.path} was cut while it was read. Run the command again.")
        return torch.frombuffer(view, dtype=like.dtype).view(like.shape)


def path_divergence(base: Tensor, edited: Tensor) -> PathDivergence:
    """Edited against base at every position of a path, from logits [positions, V] of both.

    Raises:
        GenerationError: for KL that is infinite or NaN.
    """
    logprobs = [logits.float().log_softmax(dim=1) for logits in (base, edited)]
    return PathDivergence(require_finite(kl_divergence(*logprobs)), top1_agreement(*logprobs))


def summarise_divergence(
    paths: Sequence[PathDivergence], *, tokens: int, seed: int = 0, asked: int | None = None
) -> Divergence:
    """Means over prompts; `kl` and `top1_agreement` of a prompt are means over its positions.

    Args:
        paths: one a prompt.
        tokens: positions of a path, at most.
        seed: of the intervals.
        asked: prompts, with those on which the base came to no answer.
    """

    def mean(values: Iterator[float]) -> Estimate | None:
        return Estimate.of(mean_interval(list(values), seed=seed), asked)

    return Divergence(
        kl_first_token=mean(float(path.kl[0]) for path in paths),
        kl=mean(float(path.kl.mean()) for path in paths),
        top1_agreement=mean(float(path.top1.double().mean()) for path in paths),
        tokens=tokens,
    )


def _require_room(paths: Sequence[AnswerPath], logits: Tensor, file: Path) -> int:
    """The size in bytes of all logits; raises OutputError where the disk has less space."""
    positions = sum(path.positions for path in paths)
    needed = positions * math.prod(logits.shape[1:]) * logits.element_size()
    if (free := free_bytes(file.parent)) < needed:
        raise OutputError(
            f"The base's distributions take {needed / 1e9:.1f} GB for a while, and the disk of "
            f"{file.parent} has {free / 1e9:.1f} GB free. Make room, or compare fewer prompts or "
            "tokens (`divergence.limit`, `divergence.tokens`)."
        )
    return needed
