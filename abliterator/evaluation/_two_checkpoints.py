"""The divergence of two checkpoints on neutral prompts, one of them in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterator.engines import AnswerPath, Engine
from abliterator.errors import GenerationError
from abliterator.evaluation._answers import Bar, no_bar
from abliterator.evaluation._paths import (
    LogitFile,
    PathDivergence,
    base_paths,
    summarise_divergence,
)
from abliterator.evaluation._perplexity import Perplexity, neutral_text, text_perplexity
from abliterator.record import Divergence, Side

TokenIds = list[list[int]]


@dataclass(frozen=True)
class DivergenceSettings:
    """Settings of a divergence measurement.

    Attributes:
        tokens: answer tokens compared of each prompt, at most.
        max_new_tokens: of the thinking before them, of a model that thinks.
        batch_size: prompts that the base answers together.
        max_batch_tokens: tokens in one forward pass.
        seed: of the intervals.
    """

    tokens: int = 32
    max_new_tokens: int = 256
    batch_size: int = 16
    max_batch_tokens: int = 4096
    seed: int = 0

    def paths(self, base: Engine, prompts: TokenIds, bar: Bar = no_bar) -> list[AnswerPath]:
        """The base's greedy answers to rendered prompts, along which both sides are compared."""
        with bar("base answers to neutral prompts", len(prompts)) as advance:
            return base_paths(
                base,
                prompts,
                tokens=self.tokens,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                on_batch=advance,
            )


def measure_divergence(
    load: Callable[[Side], Engine],
    render: Callable[[Engine], TokenIds],
    settings: DivergenceSettings,
    *,
    scratch: Path,
    paths: Sequence[AnswerPath] | None = None,
    bar: Bar = no_bar,
) -> Divergence:
    """KL(base || edited) along the base's greedy answers, agreement, and perplexity of fixed text.

    The unit of `kl` and `top1_agreement` is the prompt: the mean over its compared tokens.

    Args:
        load: returns the model of a side, and frees the other.
        render: token ids of the prompts, for a loaded model.
        settings: tokens, batch sizes and seed.
        scratch: a file for the base's logits; it is deleted.
        paths: the base's answers, from `settings.paths`; left out, the base generates them.
        bar: shows progress.

    Raises:
        GenerationError: if the two sides do not read the prompts alike, or give NaN.
        OutputError: if the disk has too little space for `scratch`.
    """
    # no name for an engine here: it would keep the base in memory while the edited is loaded
    prompts = render(load("base"))
    if paths is None:
        paths = settings.paths(load("base"), prompts, bar)
    with LogitFile(scratch) as logits:
        base = _write_base(load("base"), logits, paths, settings, bar)
        if render(load("edited")) != prompts:
            raise GenerationError(
                "Base and edited turn the same prompts into different tokens, so their "
                "distributions cannot be compared: their tokenizers or chat templates differ. "
                "Compare a model with an edit of itself."
            )
        path_divergences, edited = _compare(load("edited"), logits, paths, settings, bar)
    divergence = summarise_divergence(path_divergences, tokens=settings.tokens, seed=settings.seed)
    return divergence.model_copy(
        update={
            "perplexity_base": base.value,
            "perplexity_edited": edited.value,
            "perplexity_tokens": base.tokens,
        }
    )


def _write_base(
    engine: Engine,
    file: LogitFile,
    paths: Sequence[AnswerPath],
    settings: DivergenceSettings,
    bar: Bar,
) -> Perplexity:
    """Writes the base's logits; returns its perplexity."""
    limit = settings.max_batch_tokens
    with bar("base distributions", len(paths)) as advance:
        file.write(paths, engine.logits(paths, max_batch_tokens=limit, on_batch=advance))
    return text_perplexity(engine, neutral_text())


def _compare(
    engine: Engine,
    file: LogitFile,
    paths: Sequence[AnswerPath],
    settings: DivergenceSettings,
    bar: Bar,
) -> tuple[list[PathDivergence], Perplexity]:
    """The edited model against the base's logits on every path; and its perplexity."""
    limit = settings.max_batch_tokens
    with bar("edited distributions", len(paths)) as advance:
        logits = engine.logits(paths, max_batch_tokens=limit, on_batch=advance)
        path_divergences = file.compare(paths, logits)
    return path_divergences, text_perplexity(engine, neutral_text())
