"""The context length and vocabulary size of a model, checked against prompts before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.errors import CheckpointError, PromptError
from abliterator.model._chat import render_chat
from abliterator.model._config import read_config
from abliterator.model._load import LoadedModel
from abliterator.prompts import Prompt, readable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# What configs call the length of the context, the name that sizes tables of positions first: of
# the others some are left at a default that means nothing.
_CONTEXT = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"),
    *("max_seq_length", "seq_length", "n_ctx"),
)
# Types that state the length that they were trained on, and read on: distances that bias attention
# (BLOOM makes them as it goes, MPT has a table) and recurrent states.
_UNBOUNDED = ("bloom", "rwkv")

# Characters of one token at most, runs of spaces excepted.
CHARACTERS_A_TOKEN = 64


@dataclass(frozen=True)
class Limits:
    """Context length and vocabulary size of a model; None where there is no bound.

    Attributes:
        context: tokens of a prompt and its answer together.
        vocabulary: rows of the embedding; token ids are below.
    """

    context: int | None = None
    vocabulary: int | None = None


def limits_of(loaded: LoadedModel) -> Limits:
    """The limits of a loaded model: context length of its config, rows of its embedding."""
    rows = getattr(loaded.model.get_input_embeddings(), "weight", None)
    return Limits(context_limit(loaded.model.config), None if rows is None else int(rows.shape[0]))


def stored_limits(folder: Path, *, trust_remote_code: bool = False) -> Limits:
    """The limits of a checkpoint folder, as its config states them; no weights are loaded.

    None where transformers cannot read it; to load the model says what is wrong.
    """
    try:
        config = read_config(folder, trust_remote_code)
    except Exception:  # noqa: BLE001 - of a library that reads what strangers wrote
        return Limits()
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("vocab_size", "additional_vocab_size")]
    return Limits(context_limit(config), sum(map(_number, sizes)) or None)


def context_limit(config: PreTrainedConfig) -> int | None:
    """The context length of a model in tokens; None where it is unbounded (recurrent, ALiBi).

    Where positions are scaled (YaRN, LongRoPE and others), the length that scaling reaches, should
    the config give the shorter one. A sliding window is no limit.
    """
    text = config.get_text_config()
    if text.model_type in _UNBOUNDED or getattr(text, "alibi", None) is True:
        return None
    length = next(filter(None, (_number(getattr(text, name, None)) for name in _CONTEXT)), None)
    if length is None:
        return None
    scalings = (getattr(text, name, None) for name in ("rope_parameters", "rope_scaling"))
    return max([length, *(_scaled(length, scaling) for scaling in scalings)])


def _scaled(length: int, scaling: object) -> int:
    """The context length under a scaling of positions; the longest where layers differ."""
    if not isinstance(scaling, Mapping):
        return 0
    original = _number(scaling.get("original_max_position_embeddings"))
    factor = scaling.get("factor")
    if isinstance(factor, (int, float)) and factor > 1:
        return int((original or length) * min(factor, 1e6))
    return max((_scaled(length, part) for part in scaling.values()), default=0)


def _number(value: object) -> int:
    """The value if it is a positive integer, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def render_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    limits: Limits,
    *,
    name: str,
    max_new_tokens: int = 0,
    **chat: Any,
) -> list[list[int]]:
    """Token ids of each prompt in a chat, checked against the limits of the model.

    Args:
        tokenizer: of the model.
        prompts: of one set.
        limits: what the model can read.
        name: of the set, for messages.
        max_new_tokens: of an answer, which must fit in the context too.
        chat: `system`, `template_kwargs` and `before`, as `render_chat` takes them.

    Raises:
        PromptError: for a prompt that is too long; it names the set and the prompt's number.
        CheckpointError: for tokens that the model has no embedding of.
        UnsupportedModel: if the template cannot render a prompt.
    """
    rendered = []
    for number, prompt in enumerate(prompts, start=1):
        where = f"Prompt {number} of the set {name!r}"
        characters = len(readable(prompt))
        if limits.context is not None and characters > CHARACTERS_A_TOKEN * limits.context:
            raise PromptError(
                f"{where} has {characters:,} characters, and the model reads "
                f"{limits.context:,} tokens at most. Shorten or remove it."
            )
        ids = render_chat(tokenizer, prompt, **chat)
        _require_fit(ids, limits, where, max_new_tokens=max_new_tokens)
        rendered.append(ids)
    return rendered


def require_fit(
    limits: Limits, token_ids: Sequence[Sequence[int]], *, max_new_tokens: int = 0
) -> None:
    """Checks token ids against the limits of a model, before it runs.

    Raises:
        PromptError: for a prompt that is too long, with or without its answer.
        CheckpointError: for tokens that the model has no embedding of.
    """
    for index, ids in enumerate(token_ids):
        _require_fit(ids, limits, f"Prompt {index}", max_new_tokens=max_new_tokens)


def _require_fit(ids: Sequence[int], limits: Limits, where: str, *, max_new_tokens: int) -> None:
    context, vocabulary = limits.context, limits.vocabulary
    if context is not None and len(ids) > context:
        raise PromptError(
            f"{where} has {len(ids):,} tokens with its chat template, and the model reads "
            f"{context:,} at most, its answer included. Shorten or remove it."
        )
    if context is not None and len(ids) + max_new_tokens > context:
        raise PromptError(
            f"{where} has {len(ids):,} tokens with its chat template, so an answer of "
            f"{max_new_tokens:,} goes beyond the {context:,} tokens that the model reads. Shorten "
            f"or remove it, or ask for {context - len(ids):,} tokens of an answer or fewer "
            "(`rollouts.max_new_tokens`, `selection.tokens`, `divergence.tokens`; "
            "`--max-new-tokens`)."
        )
    if vocabulary is not None and ids and max(ids) >= vocabulary:
        raise CheckpointError(
            f"{where} holds token {max(ids)}, and the model's embedding has {vocabulary:,} rows: "
            "its tokenizer has more entries than the model. Use the tokenizer that belongs to "
            "these weights, or weights whose embedding was resized to it."
        )
