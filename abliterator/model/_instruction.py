"""Prompts up to the end of the user's own text, which lies before what the chat template adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from abliterator.errors import UnsupportedModel
from abliterator.model._chat import chat_text
from abliterator.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def up_to_instruction(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Each prompt in its chat, up to and with the last token of the user's own text.

    The ids are the first ones of the whole rendered prompt, so a token that the tokenizer makes of
    the end of the text and of what the template writes after it is the last. White space at the
    end of a prompt is not its text: some templates strip it.

    Args:
        tokenizer: of the model.
        prompts: of the user; of a conversation the last message.
        system: as in `render_chat`.
        template_kwargs: as in `render_chat`.

    Raises:
        UnsupportedModel: if a prompt is not followed by what the template writes after others.
    """

    def rendered(prompt: Prompt) -> str:
        return chat_text(tokenizer, prompt, system=system, template_kwargs=template_kwargs)

    # no two of them end alike, so what all have in common is the template's
    tail = _common_end([rendered(probe) for probe in ("Name a planet.", "7", "What is it?")])
    return [_up_to_end(tokenizer, rendered(prompt), tail, n) for n, prompt in enumerate(prompts, 1)]


def _common_end(texts: Sequence[str]) -> str:
    characters = zip(*(reversed(text) for text in texts), strict=False)
    return "".join(c[0] for c in takewhile(lambda c: len(set(c)) == 1, characters))[::-1]


def _up_to_end(tokenizer: PreTrainedTokenizerBase, text: str, tail: str, number: int) -> list[int]:
    """The first token ids of a rendered prompt, without those of `tail` alone."""
    if not text.endswith(tail):
        raise UnsupportedModel(
            f"The chat template does not write after prompt {number} what it writes after others, "
            "so the end of the user's text is not known. Capture at a token of the template: set "
            "`directions.position` to a number."
        )
    end = len(text[: len(text) - len(tail)].rstrip())
    if not tokenizer.is_fast:
        return _up_to_agreement(tokenizer, text, end)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = enumerate(encoded["offset_mapping"])
    last = max((i for i, (start, stop) in spans if start < min(end, stop)), default=-1)
    return list(encoded["input_ids"][: last + 1])


def _up_to_agreement(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> list[int]:
    """The same of a tokenizer without offsets: as long as the text up to its end has these ids."""
    whole, part = (
        list(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in (text, text[:end])
    )
    agreeing = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, part, strict=False))
    )
    # a token that is not the same goes on behind the end
    return whole[: agreeing + (agreeing < len(part))]
