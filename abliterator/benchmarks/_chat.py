"""Renders questions of tasks as chats, with the template and settings of the rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.benchmarks._settings import RunSettings
from abliterator.errors import BenchmarkError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatRenderer:
    """A tokenizer with its chat template, and the recipe's settings of the chat.

    It replaces the rendering of lm-eval's models, each of which has its own, without errors for a
    refused system prompt, without a fixed date, and without lists of parts.
    """

    tokenizer: PreTrainedTokenizerBase
    system: str | None
    template_kwargs: Mapping[str, Any]  # further variables of the template

    @classmethod
    def of(cls, folder: Path, settings: RunSettings) -> ChatRenderer:
        """The renderer of a checkpoint.

        Raises:
            BenchmarkError: if its tokenizer has no chat template.
        """
        from abliterator.model import load_tokenizer

        tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
        if not tokenizer.chat_template:
            raise BenchmarkError(
                f"The benchmarks are to use the chat template, but the tokenizer in {folder} has "
                "none. Set `benchmarks.chat_template: false`, or add a chat_template.jinja to "
                "the model."
            )
        options = settings.section.engine.options
        template_kwargs = dict(options.get("chat_template_args") or {})
        if options.get("enable_thinking") is not None:
            template_kwargs["enable_thinking"] = options["enable_thinking"]
        return cls(
            tokenizer, settings.chat.system, {**settings.chat.template_kwargs, **template_kwargs}
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the recipe or the engine's options state, for the record."""
        values = {"system": self.system, "template_kwargs": dict(self.template_kwargs)}
        return {name: value for name, value in values.items() if value}

    def render(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, called as lm-eval calls its models' `apply_chat_template`.

        Where a template refuses a system prompt, a task's description, which lm-eval renders as
        one, is left out, as lm-eval does; the recipe's own never is.

        Raises:
            UnsupportedModel: as `render_messages`.
        """
        from abliterator.model import render_messages

        def rendered(messages: Sequence[Mapping[str, str]]) -> str:
            return render_messages(
                self.tokenizer,
                messages,
                template_kwargs=self.template_kwargs,
                continue_last=not add_generation_prompt,
            )

        try:
            return rendered(chat_history)
        except UnsupportedModel:
            without_system = [message for message in chat_history if message["role"] != "system"]
            if self.system is not None or len(without_system) == len(chat_history):
                raise
            return rendered(without_system)
