"""Chat templates: the token ids of a prompt in the chat format of its model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product, takewhile
from typing import TYPE_CHECKING, Any, Literal

from abliterator.errors import UnsupportedModel
from abliterator.files import shown
from abliterator.model._clock import with_fixed_clock
from abliterator.model._foreign import as_sentence, foreign
from abliterator.model._render import TemplateFailure, render_template
from abliterator.prompts import Conversation, Prompt, readable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
# How a template takes the contents of each role: as a string, or as a list of parts with a type.
_Forms = frozenset[tuple[str, Literal["string", "parts"]]]


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    before: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Token ids of a chat up to and with the generation prompt; of one user turn, or of more.

    `before` are the turns that went before `prompt`, each with its answer. A conversation that has
    a system message keeps it, and its scripted turns, if any are left, become one. The template
    writes the special tokens, so the text is tokenised without adding any (no second BOS).

    Raises:
        UnsupportedModel: as `render_messages`; if the template leaves out tools or their results;
            or if the tokenizer cannot encode the text.
    """
    text = chat_text(
        tokenizer, prompt, system=system, template_kwargs=template_kwargs, before=before
    )
    # The text of a prompt is in no error: some prompts are harmful.
    with foreign(
        f"The model's tokenizer cannot encode a prompt of {len(readable(prompt))} characters",
        "Change or leave out the prompt.",
        error=UnsupportedModel,
    ):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    before: Sequence[tuple[str, str]] = (),
) -> str:
    """The text that `render_chat` encodes; its arguments and errors."""
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in before:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    if isinstance(prompt, Conversation):
        messages = prompt.joined().messages
        turns = [*([] if messages[0]["role"] == "system" else turns), *messages]
        if prompt.tools:
            template_kwargs = {**(template_kwargs or {}), "tools": list(prompt.tools)}
    else:
        turns.append({"role": "user", "content": prompt})
    text = render_messages(tokenizer, turns, template_kwargs=template_kwargs)
    if isinstance(prompt, Conversation):
        _require_tools(text, prompt)
    return text


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    continue_last: bool = False,
) -> str:
    """The text of a chat, as the tokenizer's chat template writes it.

    Contents reach the template in the form that it reads, strings or lists of parts, which is tried
    out once for a template. A template that asks for the date gets a fixed one, and one that draws
    at random draws the same each time. Its time and memory are bounded.

    Args:
        tokenizer: of the model.
        messages: of "role" system, user and assistant, each with a text as "content".
        template_kwargs: further variables of the template.
        continue_last: whether the text ends within the last message, for the model to go on with
            it, rather than with the generation prompt.

    Raises:
        UnsupportedModel: if there is no chat template; if it raises, takes too long, or writes
            without end; or if what it writes lacks the prompt.
    """
    template = _template_of(tokenizer, template_kwargs or {})
    forms = _forms(template, tuple(sorted({message["role"] for message in messages})))
    render = partial(template.render, forms=forms, continue_last=continue_last)
    try:
        text = render(messages)
    except TemplateFailure as error:
        raise _cannot_render(messages, error) from error
    _require_prompt(text, messages, render)
    return text


def template_tail(
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens that the chat template puts after every prompt, whatever the prompt is.

    They are the common end of two rendered prompts that share no text. Token -1 of a prompt is the
    last of them.
    """
    first, second = (
        render_chat(tokenizer, prompt, system=system, template_kwargs=template_kwargs)
        for prompt in ("Name a planet.", "7")
    )
    pairs = zip(reversed(first), reversed(second), strict=False)
    common = takewhile(lambda pair: pair[0] == pair[1], pairs)
    return [token for token, _ in common][::-1]


@dataclass(frozen=True)
class _Template:
    """A chat template with its variables; hashable, so that its forms can be cached.

    Attributes:
        source: Jinja.
        variables: what else it may read, as JSON.
        tokenizer: None, or one with code of its own that renders in place of transformers'.
    """

    source: str
    variables: str
    tokenizer: PreTrainedTokenizerBase | None

    def render(
        self, messages: Sequence[Message], forms: _Forms, *, continue_last: bool = False
    ) -> str:
        """The text of the messages, contents in their forms; raises TemplateFailure."""
        shaped: list[dict[str, Any]] = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if (message["role"], "parts") in forms and message.get("content") is not None
            else dict(message)
            for message in messages
        ]
        variables = json.loads(self.variables)
        if self.tokenizer is None:
            request = {"template": self.source, "messages": shaped, "variables": variables}
            return render_template({**request, "continue_last": continue_last})
        try:
            text = self.tokenizer.apply_chat_template(
                shaped,
                tokenize=False,
                chat_template=self.source,
                add_generation_prompt=not continue_last,
                continue_final_message=continue_last,
                **variables,
            )
        except Exception as error:
            raise TemplateFailure(as_sentence(error)) from error
        return str(text)


def _template_of(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> _Template:
    """The tokenizer's default chat template, with its variables."""
    from transformers import PreTrainedTokenizerBase

    if not tokenizer.chat_template:
        raise UnsupportedModel(
            "The model has no chat template, so its prompts cannot be rendered as the model was "
            "trained to read them. Use the chat or instruct version of the model, or put a "
            "chat_template.jinja in its folder."
        )
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else None
    try:
        source = tokenizer.get_chat_template(tools=template_kwargs.get("tools"))
    except ValueError:
        source = None
    if not isinstance(source, str):
        problem = (
            f"has several chat templates ({shown(', '.join(map(str, templates)))}), of which none "
            "is the default"
            if templates
            else f"has a chat template that is no text ({shown(source)})"
        )
        raise UnsupportedModel(
            f"The model {problem}, so it is not known how its prompts are rendered. Put the one "
            "that is wanted into its folder as chat_template.jinja."
        )
    variables = {**tokenizer.special_tokens_map, **template_kwargs}
    has_own_renderer = (
        type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    )
    return _Template(
        with_fixed_clock(source),
        json.dumps(variables, default=str),  # YAML has dates
        tokenizer if has_own_renderer else None,
    )


# Words that no template has, one for each role.
_PROBES = {"system": "qsystemq", "user": "quserq", "assistant": "qassistantq"}


@lru_cache(maxsize=64)
def _forms(template: _Template, roles: tuple[str, ...]) -> _Forms:
    """The form in which the template takes the contents of each role.

    Templates of vision models iterate over parts: `{% for part in message.content %}`. Given a
    string they write an empty turn, or raise. So the form is determined from rendered probes.

    Raises:
        UnsupportedModel: if there is no form in which the contents of every role are written.
    """
    turns = [*[role for role in ("system",) if role in roles], "user"]
    if "assistant" in roles:
        turns += ["assistant", "user"]
    probe = [{"role": role, "content": _PROBES[role]} for role in turns]
    failures: list[TemplateFailure] = []
    missing: set[str] = set()
    for forms in _all_forms(sorted(set(turns))):
        try:
            text = template.render(probe, forms).casefold()
        except TemplateFailure as error:
            failures.append(error)
            continue
        unwritten = {role for role in turns if not _is_written(_PROBES[role], text)}
        if not unwritten:
            return forms
        missing = min(missing or unwritten, unwritten, key=len)
    if failures and not missing:
        raise _cannot_render(probe, failures[0]) from failures[0]
    names = {"user": "prompt", "system": "system prompt", "assistant": "earlier answers"}
    raise UnsupportedModel(
        f"The model's chat template leaves out the {' and the '.join(names[m] for m in missing)}, "
        "whether contents are strings or lists of parts, so the model would not read it. Correct "
        "the template, or the system prompt and the template arguments in the recipe."
    )


def _is_written(probe: str, text: str) -> bool:
    """Whether a rendered text contains the probe other than in a printed list of parts."""
    return probe in text and not re.search(rf"""text['"]\s*:\s*['"]{probe}""", text)


def _all_forms(roles: Sequence[str]) -> Iterator[_Forms]:
    """All assignments of a form to each role: all strings, then all parts, then mixed."""
    forms: tuple[Literal["string", "parts"], ...] = ("string", "parts")
    combinations = product(forms, repeat=len(roles))
    for combination in sorted(combinations, key=lambda combination: len(set(combination))):
        yield frozenset(zip(roles, combination, strict=True))


def _require_prompt(
    text: str, messages: Sequence[Message], rendered: Callable[[Sequence[Message]], str]
) -> None:
    """Raises UnsupportedModel where the rendered text lacks most of the prompt.

    Templates may trim and replace. A template that strips tags or thoughts leaves little of a
    prompt that looks like one.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    prompt = messages[turns[-1]]["content"] if turns else ""
    if prompt.strip() in text:
        return
    words, written = _words(prompt), _words(text)
    if words and "".join(words) in "".join(written):
        return
    n_missing = len([word for word in words if word not in set(written)])
    emptied = [{**m, "content": ""} if i == turns[-1] else m for i, m in enumerate(messages)]
    unread = 2 * n_missing > len(words)
    with suppress(TemplateFailure):  # a template may refuse an empty turn
        unread = unread or text == rendered(emptied)
    if unread:
        raise UnsupportedModel(
            f"The model's chat template leaves out most of a prompt of {len(prompt)} characters, "
            "so the model would not read it. Change or leave out the prompt: the template probably "
            "takes part of it for a tag of its own."
        )


def _require_tools(text: str, conversation: Conversation) -> None:
    """Raises UnsupportedModel where the rendered text lacks a tool, or what one returned."""
    results = [m["content"] for m in conversation.messages if m["role"] == "tool"]
    missing = [name for name in conversation.tool_names if name not in text]
    # a template may write a text as JSON
    unread = [r for r in results if r.strip() not in text and json.dumps(r)[1:-1] not in text]
    if missing or unread:
        part = f"the tool {missing[0]!r}" if missing else "the result of a tool"
        raise UnsupportedModel(
            f"The model's chat template leaves out {part} of a conversation, so the model would "
            "not read it. Use a model whose template takes tools, or describe them in the prompt."
        )


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _cannot_render(messages: Sequence[Message], error: TemplateFailure) -> UnsupportedModel:
    with_system = any(message["role"] == "system" for message in messages)
    return UnsupportedModel(
        f"The model's chat template cannot render a chat {'with' if with_system else 'without'} a "
        f"system prompt: {as_sentence(error)} Change the system prompt or the template arguments "
        "in the recipe."
    )
