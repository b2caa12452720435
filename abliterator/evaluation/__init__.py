"""How far an edit moved the next-token distributions.

Numbers only: the room does not know which prompts should have stayed the same, nor what is too far.
Base and edited are loaded one after the other, never together: the base's logits wait on the disk.

    paths = [answer_path(prompt, answer, tokens=32, stopped=True) for prompt, answer in ...]
    write_logits(base, paths, file, max_batch_tokens=4096)            # the base loaded
    compare_logits(edited, paths, file, max_batch_tokens=4096)[0].kl  # [positions] nats
    text_perplexity(edited, neutral_text()).value

The answers are the base's greedy ones, so both models read the same tokens at every position. The
fixed text is prose that comes with the package, not the model's own answers: those have a
perplexity near 1 for the base by their making.
"""

from abliterator.divergence._distributions import (
    first_token_logprobs,
    kl_divergence,
    kl_terms,
    require_finite,
    top1_agreement,
)
from abliterator.divergence._paths import (
    AnswerPath,
    PathDivergence,
    answer_path,
    compare_logits,
    path_divergence,
    write_logits,
)
from abliterator.divergence._text import Perplexity, neutral_text, text_perplexity

__all__ = [
    "AnswerPath",
    "PathDivergence",
    "Perplexity",
    "answer_path",
    "compare_logits",
    "first_token_logprobs",
    "kl_divergence",
    "kl_terms",
    "neutral_text",
    "path_divergence",
    "require_finite",
    "text_perplexity",
    "top1_agreement",
    "write_logits",
]
