"""Base and edited along the base's own answers, one model in memory at a time.

The base's logits go to a file in its own dtype, which loses nothing, in the order in which the
edited model makes its own; of both, never more than one batch is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from abliterator.divergence._distributions import (
    kl_divergence,
    last_logits,
    require_finite,
    require_prompts,
    top1_agreement,
)
from abliterator.errors import GenerationError, OutputError
from abliterator.files import OpenFile, free_bytes, writable, write_fully
from abliterator.model import LoadedModel, equal_length_batches, run_batches
from abliterator.record import Divergence, Estimate
from abliterator.statistics import mean_interval

# Logits of one batch: with their float32 and float64 copies, a few times this is in memory.
BATCH_BYTES = 32 << 20

OnBatch = Callable[[int], None]


class AnswerPath(NamedTuple):
    """A prompt with the base's answer to it, and how many of its last positions are compared.

    The first of those positions predicts the first token of the answer.
    """

    token_ids: tuple[int, ...]
    positions: int


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


def write_logits(
    loaded: LoadedModel,
    paths: Sequence[AnswerPath],
    file: Path,
    *,
    max_batch_tokens: int,
    on_batch: OnBatch | None = None,
) -> None:
    """Writes the logits of every compared position to `file`: N x T x V numbers.

    Raises:
        OutputError: if the disk has no room for them.
        FileError: if the file cannot be written, as when the disk fills up meanwhile.
        GenerationError: if there is no path, or logits are NaN or infinite.
    """
    with writable(file, 0):
        stream = file.open("wb", buffering=0)  # nothing is left to be written when it is closed
    with stream:
        out = OpenFile(file, stream, 0)
        for number, logits in enumerate(_logits(loaded, paths, max_batch_tokens, on_batch)):
            if number == 0:
                out = out._replace(size=_require_room(paths, logits, file))
            write_fully(out, logits.contiguous().view(torch.uint8).numpy().data.cast("B"))


def compare_logits(
    loaded: LoadedModel,
    paths: Sequence[AnswerPath],
    file: Path,
    *,
    max_batch_tokens: int,
    on_batch: OnBatch | None = None,
) -> list[PathDivergence]:
    """The edited model against what `write_logits` wrote of the base on the same paths.

    Returns:
        One for each path, in their order.

    Raises:
        GenerationError: if the two models have other vocabularies or dtypes, or logits are NaN or
            infinite, or KL is.
    """
    # made before the large temporaries: small tensors kept among them would be holes in the heap
    lengths = [path.positions for path in paths]
    kl = torch.split(torch.empty(sum(lengths), dtype=torch.float64), lengths)
    top1 = torch.split(torch.empty(sum(lengths), dtype=torch.bool), lengths)
    buffer = bytearray()  # of one path, used again: many large ones leave holes in memory
    order = [i for batch in _batches(paths, max_batch_tokens, 0) for i in batch]
    with file.open("rb", buffering=0) as stream:
        logits = _logits(loaded, paths, max_batch_tokens, on_batch)
        for number, (index, edited) in enumerate(zip(order, logits, strict=True)):
            if number == 0:
                _require_same_shape(edited, sum(lengths), file)
            if len(buffer) < edited.nbytes:
                buffer = bytearray(edited.nbytes)
            base = _read(stream, edited, buffer, file).float().log_softmax(dim=1)
            edited = edited.float().log_softmax(dim=1)
            kl[index].copy_(require_finite(kl_divergence(base, edited)))
            top1[index].copy_(top1_agreement(base, edited))
    return [PathDivergence(*both) for both in zip(kl, top1, strict=True)]


def path_divergence(found: Sequence[PathDivergence], *, tokens: int, seed: int) -> Divergence:
    """Means over prompts; `kl` and `top1_agreement` of a prompt are means over its positions.

    Args:
        found: from `compare_logits`.
        tokens: positions of a path, at most.
        seed: of the intervals.
    """

    def mean(values: list[float]) -> Estimate | None:
        return Estimate.of(mean_interval(values, seed=seed))

    return Divergence(
        kl_first_token=mean([float(path.kl[0]) for path in found]),
        kl=mean([float(path.kl.mean()) for path in found]),
        top1_agreement=mean([float(path.top1.double().mean()) for path in found]),
        tokens=tokens,
    )


def _require_same_shape(logits: Tensor, positions: int, file: Path) -> None:
    if file.stat().st_size != positions * logits.shape[1] * logits.element_size():
        raise GenerationError(
            "Base and edited have distributions of other sizes, so they cannot be compared: their "
            "vocabularies or dtypes differ. Compare a model with an edit of itself, in one "
            "`--dtype`."
        )


def _read(stream: FileIO, like: Tensor, buffer: bytearray, file: Path) -> Tensor:
    """The next logits of the file, which lie in `buffer` until the next call."""
    view, done = memoryview(buffer)[: like.nbytes], 0
    while done < len(view) and (got := stream.readinto(view[done:])):
        done += got
    if done < len(view):
        raise OutputError(f"{file} was cut while it was read. Run the command again.")
    return torch.frombuffer(view, dtype=like.dtype).view(like.shape)


def _logits(
    loaded: LoadedModel,
    paths: Sequence[AnswerPath],
    max_batch_tokens: int,
    on_batch: OnBatch | None,
) -> Iterator[Tensor]:
    """[positions, V] of every path on the CPU, path by path, in the order of the batches."""
    require_prompts(loaded, [path.token_ids for path in paths])
    vocabulary = loaded.model.config.get_text_config().vocab_size
    bytes_a_position = vocabulary * loaded.model.dtype.itemsize
    batches = _batches(paths, max_batch_tokens, bytes_a_position)
    for batch, logits in run_batches(batches, partial(_batch_logits, loaded, paths)):
        for row, index in enumerate(batch):
            yield logits[row, -paths[index].positions :].cpu()
        if on_batch:
            on_batch(len(batch))


def _batches(
    paths: Sequence[AnswerPath], max_batch_tokens: int, bytes_a_position: int
) -> list[list[int]]:
    """Batches of one length, cut so that their logits stay small; the order stays the same."""
    longest = max((path.positions for path in paths), default=1)
    rows = max(1, BATCH_BYTES // max(1, longest * bytes_a_position))
    batches = equal_length_batches([path.token_ids for path in paths], max_batch_tokens)
    return [batch[i : i + rows] for batch in batches for i in range(0, len(batch), rows)]


def _batch_logits(loaded: LoadedModel, paths: Sequence[AnswerPath], batch: list[int]) -> Tensor:
    positions = max(paths[i].positions for i in batch)
    return last_logits(loaded, [paths[i].token_ids for i in batch], positions)


def _require_room(paths: Sequence[AnswerPath], logits: Tensor, file: Path) -> int:
    """The bytes that all logits take; raises OutputError where the disk has no room for them."""
    positions = sum(path.positions for path in paths)
    needed = positions * math.prod(logits.shape[1:]) * logits.element_size()
    if (free := free_bytes(file.parent)) < needed:
        raise OutputError(
            f"The base's distributions take {needed / 1e9:.1f} GB for a while, and the disk of "
            f"{file.parent} has {free / 1e9:.1f} GB free. Make room, or compare fewer prompts or "
            "tokens (`divergence.limit`, `divergence.tokens`)."
        )
    return needed
