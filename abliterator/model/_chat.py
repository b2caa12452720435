"""A prompt as the model was trained to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from abliterator.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some templates write today's date: prompts, and so directions, would change from day to day. This
# is the date that Llama 3's template falls back to. A macro, because a template sees plain data
# only, never a function of ours.
_FIXED_DATE = "26 Jul 2024"
_FIXED_CLOCK = "{%- macro strftime_now(format) %}" + _FIXED_DATE + "{% endmacro %}"


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    before: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Token ids of a chat up to and with the generation prompt; of one user turn, or of more.

    `before` are the turns that went before `prompt`, each with its answer. The template writes the
    special tokens, so the text is tokenised without adding any (no second BOS). A template that
    asks for the date gets a fixed one.

    Raises:
        UnsupportedModel: if there is no chat template, or it refuses these messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UnsupportedModel(
            "The model has no chat template, so its prompts cannot be rendered as the model was "
            "trained to read them. Use the chat or instruct version of the model, or put a "
            "chat_template.jinja in its folder."
        )
    turns = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in before:
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": answered})
    turns.append({"role": "user", "content": prompt})
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_CLOCK + template
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=True,
            chat_template=template,
            **dict(template_kwargs or {}),
        )
    except (TemplateError, TypeError) as error:
        raise UnsupportedModel(
            "The model's chat template cannot render a chat "
            f"{'with' if system is not None else 'without'} a system prompt: {one_line(error)} "
            "Change the system prompt or the template arguments in the recipe."
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def template_tail(
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens that the chat template puts after every prompt, whatever the prompt is.

    Found by rendering two prompts that share nothing: where the ends of both agree, it is the
    template that speaks. Token -1 of a prompt is the last of them.
    """
    first, second = (
        render_chat(tokenizer, prompt, system=system, template_kwargs=template_kwargs)
        for prompt in ("Name a planet.", "7")
    )
    together = zip(reversed(first), reversed(second), strict=False)
    alike = takewhile(lambda pair: pair[0] == pair[1], together)
    return [token for token, _ in alike][::-1]


def one_line(error: BaseException) -> str:
    """An error's text on one line, as a sentence of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 300 else text[:297] + "..."
    return text if text.endswith((".", "!", "?")) else text + "."
