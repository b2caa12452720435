"""Prompts of several messages: earlier turns, scripted turns of the user, and tools.

A user turn that another user turn follows is a scripted one: the model answers it before it reads
the next. So the messages user, user, user ask for three answers, of which the last is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

Message = Mapping[str, Any]

_ROLES = ("system", "user", "assistant", "tool")
_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name")


class Conversation(BaseModel):
    """A conversation that a model continues, and the tools that it may call.

    Attributes:
        messages: each with "role" (system, user, assistant or tool) and "content"; the last is
            what is answered, of the user or a tool. Calls and results of tools are given as
            transformers' chat templates read them: "tool_calls", "tool_call_id", "name".
        tools: JSON schemas of functions, as transformers' chat templates read them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()

    def __hash__(self) -> int:
        """Hash of its JSON."""
        return hash(self.model_dump_json())

    @model_serializer(mode="wrap")
    def _without_empty_tools(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in plain(self).items() if key != "tools" or value}

    @model_validator(mode="after")
    def _is_answerable(self) -> Self:
        for number, message in enumerate(self.messages, start=1):
            _require_message(message, number)
        roles = [message["role"] for message in self.messages]
        if "system" in roles[1:]:
            raise ValueError("a system message comes first or not at all")
        if not roles or roles[-1] not in ("user", "tool") or "user" not in roles:
            raise ValueError("the last message must be one of the user, which the model answers")
        for tool in self.tools:
            if not _tool_name(tool):
                raise ValueError("a tool without a name; give the JSON schema of a function")
        return self

    @property
    def tool_names(self) -> list[str]:
        """The names of its tools."""
        return [_tool_name(tool) for tool in self.tools]

    @property
    def user_text(self) -> str:
        """All that the user says, a paragraph a turn."""
        return _paragraphs(m["content"] for m in self.messages if m["role"] == "user")

    @property
    def text(self) -> str:
        """The conversation as readable text: a paragraph a message, after its role.

        A question alone is its text.
        """
        if len(self.messages) == 1 and not self.tools:
            return _spoken(self.messages[0])
        lines = (f"{message['role'].capitalize()}: {_spoken(message)}" for message in self.messages)
        tools = [f"Tools: {', '.join(self.tool_names)}"] if self.tools else []
        return _paragraphs([*tools, *lines])

    @property
    def turns(self) -> list[int]:
        """How many messages the model has read at each of its answers."""
        following = [message["role"] for message in self.messages[1:]]
        scripted = [
            i + 1
            for i, role in enumerate(following)
            if role == "user" and self.messages[i]["role"] in ("user", "tool")
        ]
        return [*scripted, len(self.messages)]

    def answered(self, answers: Sequence[str]) -> Conversation:
        """The conversation up to its next turn, with the model's answers to those before."""
        turns = self.turns
        messages: list[dict[str, Any]] = []
        start = 0
        for end, answer in zip(turns, answers, strict=False):
            messages += [*self.messages[start:end], {"role": "assistant", "content": answer}]
            start = end
        messages += self.messages[start : turns[len(answers)]]
        return self.model_copy(update={"messages": tuple(messages)})

    def joined(self) -> Conversation:
        """The conversation with scripted turns in one message, for a model that answers once."""
        messages: list[dict[str, Any]] = []
        for message in self.messages:
            if messages and messages[-1]["role"] == message["role"] == "user":
                contents = (messages[-1]["content"], message["content"])
                message = {"role": "user", "content": _paragraphs(contents)}
                messages.pop()
            messages.append(message)
        return self.model_copy(update={"messages": tuple(messages)})


Prompt = str | Conversation


def user_text(prompt: Prompt) -> str:
    """What the user says in a prompt: of a conversation all turns."""
    return prompt.user_text if isinstance(prompt, Conversation) else prompt


def readable(prompt: Prompt) -> str:
    """A prompt as text for people and judges; of a conversation with the roles."""
    return prompt.text if isinstance(prompt, Conversation) else prompt


def turns_of(prompt: Prompt) -> int:
    """How many answers a prompt asks for."""
    return len(prompt.turns) if isinstance(prompt, Conversation) else 1


def next_turn(prompt: Prompt, answers: Sequence[str]) -> Prompt:
    """What the model reads after its first answers: the prompt up to the next turn."""
    return prompt.answered(answers) if isinstance(prompt, Conversation) else prompt


def as_read(prompt: Prompt, answers: Sequence[str] | None) -> str:
    """What the model read before its last answer, as text.

    Args:
        prompt: as written.
        answers: the model's own to the scripted turns before; None where they were one turn.
    """
    if isinstance(prompt, str):
        return prompt
    return (prompt.joined() if answers is None else prompt.answered(answers)).text


def _require_message(message: Message, number: int) -> None:
    """Raises ValueError, without the message's text, for what no chat template can render."""
    where = f"message {number}"
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise ValueError(f"{where} has no role of {', '.join(_ROLES)}")
    unknown = sorted(map(str, message.keys() - set(_KEYS)))
    if unknown:
        raise ValueError(f"{where} has the key {unknown[0]!r}, and may have {', '.join(_KEYS)}")
    if content is None and message.get("tool_calls"):
        return
    if not isinstance(content, str):
        raise ValueError(f"the content of {where} is no text")
    if not content.strip() and role != "tool" and not message.get("tool_calls"):
        raise ValueError(f"{where} is empty")


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _spoken(message: Message) -> str:
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join(filter(None, [message.get("content") or "", *calls]))


def _paragraphs(texts: Iterator[str] | Sequence[str]) -> str:
    return "\n\n".join(texts)
