"""The divergence of two checkpoints on neutral prompts, one of them in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from abliterator.errors import GenerationError
from abliterator.record import Divergence, Side

if TYPE_CHECKING:
    from abliterator.divergence import AnswerPath, PathDivergence, Perplexity
    from abliterator.model import LoadedModel

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def no_bar(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Shows nothing."""
    return nullcontext(lambda amount: None)


@dataclass(frozen=True)
class DivergenceSettings:
    """How divergence is measured.

    Attributes:
        tokens: answer tokens compared of each prompt, at most.
        batch_size: prompts that the base answers together.
        max_batch_tokens: tokens in one forward pass.
        seed: of the intervals.
    """

    tokens: int = 32
    batch_size: int = 16
    max_batch_tokens: int = 4096
    seed: int = 0


def answer_paths(
    loaded: LoadedModel,
    prompts: list[list[int]],
    settings: DivergenceSettings,
    *,
    bar: Bar = no_bar,
) -> list[AnswerPath]:
    """The base's greedy answers to rendered prompts: where both sides are compared."""
    from abliterator.divergence import answer_path
    from abliterator.generation import generate, stop_ids

    with bar("base answers to neutral prompts", len(prompts)) as advance:
        answers = generate(
            loaded,
            prompts,
            max_new_tokens=settings.tokens,
            batch_size=settings.batch_size,
            stop_ids=stop_ids(loaded),
            on_batch=advance,
        )
    return [
        answer_path(
            prompt,
            answer.token_ids,
            tokens=settings.tokens,
            stopped=answer.finish_reason == "stop",
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def measure_divergence(
    load: Callable[[Side], LoadedModel],
    render: Callable[[LoadedModel], list[list[int]]],
    settings: DivergenceSettings,
    *,
    scratch: Path,
    paths: Sequence[AnswerPath] | None = None,
    bar: Bar = no_bar,
) -> Divergence:
    """KL(base || edited) along the base's greedy answers, agreement, and perplexity of fixed text.

    The unit of `kl` and `top1_agreement` is the prompt: the mean over its compared tokens.

    Args:
        load: gives the model of a side, and lets go of the other.
        render: token ids of the prompts, for a loaded model.
        settings: how.
        scratch: a file for the base's logits; it is deleted.
        paths: the base's answers, from `answer_paths`; left out, the base gives them.
        bar: shows progress.

    Raises:
        GenerationError: if the two sides do not read the prompts alike, or give NaN.
        OutputError: if the disk has no room for `scratch`.
    """
    from abliterator.divergence import path_divergence

    if paths is None:
        paths = answer_paths(load("base"), render(load("base")), settings, bar=bar)
    both = _Both(paths, settings, scratch, bar)
    try:
        prompts, base = render(load("base")), _base(load("base"), both)
        found, edited = _edited(load("edited"), both, render, prompts)
    finally:
        scratch.unlink(missing_ok=True)
    along = path_divergence(found, tokens=settings.tokens, seed=settings.seed)
    return along.model_copy(
        update={
            "perplexity_base": base.value,
            "perplexity_edited": edited.value,
            "perplexity_tokens": base.tokens,
        }
    )


class _Both(NamedTuple):
    """What is the same for both sides."""

    paths: Sequence[AnswerPath]
    settings: DivergenceSettings
    scratch: Path
    bar: Bar


def _base(loaded: LoadedModel, both: _Both) -> Perplexity:
    """The base's perplexity; its logits go to the scratch file."""
    from abliterator.divergence import neutral_text, text_perplexity, write_logits

    with both.bar("base distributions", len(both.paths)) as advance:
        limit = both.settings.max_batch_tokens
        write_logits(loaded, both.paths, both.scratch, max_batch_tokens=limit, on_batch=advance)
    return text_perplexity(loaded, neutral_text())


def _edited(
    loaded: LoadedModel,
    both: _Both,
    render: Callable[[LoadedModel], list[list[int]]],
    prompts: list[list[int]],
) -> tuple[list[PathDivergence], Perplexity]:
    """The edited model against the base's logits on every path; and its perplexity."""
    from abliterator.divergence import compare_logits, neutral_text, text_perplexity

    if render(loaded) != prompts:
        raise GenerationError(
            "Base and edited turn the same prompts into different tokens, so their distributions "
            "cannot be compared: their tokenizers or chat templates differ. Compare a model with "
            "an edit of itself."
        )
    with both.bar("edited distributions", len(both.paths)) as advance:
        limit = both.settings.max_batch_tokens
        found = compare_logits(
            loaded, both.paths, both.scratch, max_batch_tokens=limit, on_batch=advance
        )
    return found, text_perplexity(loaded, neutral_text())
