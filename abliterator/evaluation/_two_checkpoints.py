"""The divergence of two checkpoints on neutral prompts, one of them in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.engines import AnswerPath, Engine
from abliterator.errors import GenerationError
from abliterator.evaluation._answers import Bar, no_bar
from abliterator.evaluation._paths import LogitFile, summarise_divergence
from abliterator.evaluation._perplexity import Perplexity, neutral_text, text_perplexity
from abliterator.record import Divergence, Side

if TYPE_CHECKING:
    from torch import Tensor

TokenIds = list[list[int]]


def measure_divergence(
    load: Callable[[Side], Engine],
    render: Callable[[Engine], TokenIds],
    paths: Sequence[AnswerPath],
    *,
    tokens: int,
    scratch: Path,
    max_batch_tokens: int = 4096,
    seed: int = 0,
    bar: Bar = no_bar,
) -> Divergence:
    """KL(base || edited) along the base's greedy answers, agreement, and perplexity of fixed text.

    The unit of `kl` and `top1_agreement` is the prompt: the mean over its compared tokens.

    Args:
        load: returns the model of a side, and frees the other.
        render: token ids of the prompts, for a loaded model.
        paths: the base's answers, from `base_paths`.
        tokens: answer tokens compared of each prompt, at most.
        scratch: a file for the base's logits; it is deleted.
        max_batch_tokens: tokens in one forward pass.
        seed: of the intervals.
        bar: shows progress.

    Raises:
        GenerationError: if the two sides do not read the prompts alike, or give NaN.
        OutputError: if the disk has too little space for `scratch`.
    """

    def logits(engine: Engine, advance: Callable[[int], None]) -> Iterator[tuple[int, Tensor]]:
        return engine.logits(paths, max_batch_tokens=max_batch_tokens, on_batch=advance)

    def perplexity(engine: Engine) -> Perplexity:
        return text_perplexity(engine, neutral_text())

    # no name for an engine here: it would keep the base in memory while the edited is loaded
    with LogitFile(scratch) as file:
        with bar("base distributions", len(paths)) as advance:
            file.write(paths, logits(load("base"), advance))
        base, prompts = perplexity(load("base")), render(load("base"))
        if render(load("edited")) != prompts:
            raise GenerationError(
                "Base and edited turn the same prompts into different tokens, so their "
                "distributions cannot be compared: their tokenizers or chat templates differ. "
                "Compare a model with an edit of itself."
            )
        with bar("edited distributions", len(paths)) as advance:
            path_divergences = file.compare(paths, logits(load("edited"), advance))
    divergence = summarise_divergence(
        path_divergences, tokens=tokens, seed=seed, asked=len(prompts)
    )
    return divergence.model_copy(
        update={
            "perplexity_base": base.value,
            "perplexity_edited": perplexity(load("edited")).value,
            "perplexity_tokens": base.tokens,
        }
    )
