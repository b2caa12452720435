"""How many tokens a chat template puts around a prompt, about, without transformers."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from abliterator.errors import FileError
from abliterator.files import read_text
from abliterator.processes import child_environment, python_command
from abliterator.recipe import Chat

_SECONDS, _MEMORY = 5, 1 << 30  # that a template may take
_PROMPT = "PROMPT"
# What is a token as a rule: a special one, a word, a sign, a line end.
_TOKEN = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]+\]|\w+|[^\w\s]|\n")


class TemplateTokens(NamedTuple):
    """Tokens before a prompt and behind it."""

    before: int
    behind: int


# Of a template that does not render here: those of most models.
USUAL = TemplateTokens(25, 5)


def template_tokens(folder: Path, chat: Chat) -> TemplateTokens:
    """The tokens around a prompt in a recipe's chat, within a quarter for most templates.

    The template is rendered in a process of its own, in bounded time and memory.
    """
    settings = _settings(folder)
    request = {
        "template": _template(folder, settings),
        "messages": [
            *([{"role": "system", "content": chat.system}] if chat.system is not None else []),
            {"role": "user", "content": _PROMPT},
        ],
        "variables": {
            "add_generation_prompt": True,
            **{name: _text(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")},
            **chat.template_kwargs,
        },
    }
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(
            python_command(str(Path(__file__).with_name("_template_child.py")), str(_MEMORY)),
            input=json.dumps(request).encode(),
            capture_output=True,
            env=child_environment(),
            timeout=_SECONDS,
            check=True,
        )
        before, behind = done.stdout.decode().split(_PROMPT)
        return TemplateTokens(len(_TOKEN.findall(before)), len(_TOKEN.findall(behind)))
    return USUAL


def _settings(folder: Path) -> Mapping[str, Any]:
    with suppress(FileError, ValueError, RecursionError):
        settings = json.loads(read_text(folder / "tokenizer_config.json"))
        return settings if isinstance(settings, dict) else {}
    return {}


def _template(folder: Path, settings: Mapping[str, Any]) -> str:
    with suppress(FileError):
        return read_text(folder / "chat_template.jinja")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else ""


def _text(token: object) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
