"""Renders chat templates in a process of its own; run by a fresh interpreter, without abliterator.

usage: python _render_child.py SECONDS BYTES     # a JSON object a line, on stdin and stdout

A chat template is a program that came with a model. Here it may take SECONDS and BYTES of memory:
a watchdog in C ends the process where it takes longer, also within one long operation.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

_LONGEST_ERROR = 2000
# Characters that a template may write of its own, and of each that it was given.
_OWN_CHARACTERS, _TIMES = 1_000_000, 16


def main(seconds: float, memory: int) -> None:
    """Answers every line of stdin; first says whether transformers could be imported."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is who is interrupted
    out = os.fdopen(os.dup(1), "wb")
    with Path(os.devnull).open("w", encoding="utf-8") as devnull:
        os.dup2(devnull.fileno(), 1)
        try:
            from transformers.utils.chat_template_utils import render_jinja_template
        except Exception as error:  # noqa: BLE001  (the parent reports it)
            _answer(out, {"error": _text(error)})
            return
        _limit_memory(memory)
        _answer(out, {})
        for line in sys.stdin.buffer:
            faulthandler.dump_traceback_later(seconds, exit=True, file=devnull)
            answer = _rendered(render_jinja_template, json.loads(line), devnull)
            faulthandler.cancel_dump_traceback_later()
            _answer(out, answer)


def _rendered(render: Any, request: dict[str, Any], devnull: TextIO) -> dict[str, str]:
    # `random` and `lipsum` of Jinja draw from the global generator
    random.seed(0)  # noqa: TID251
    try:
        (text,), _ = render(
            conversations=[request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=not request["continue_last"],
            continue_final_message=request["continue_last"],
            **request["variables"],
        )
        limit = _OWN_CHARACTERS + _TIMES * len(json.dumps(request["messages"]))
        if len(text) > limit:
            return {"error": f"It writes {len(text):,} characters, and {limit:,} are allowed."}
        return {"text": text}
    except BaseException as error:  # noqa: BLE001  (whatever a template does is its own failure)
        return {"error": _text(error)}


def _limit_memory(memory: int) -> None:
    """Where Linux says how much address space there is, lets it grow by `memory` bytes alone."""
    if sys.platform == "linux":
        import resource

        with suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  (an error whose text cannot be made)
        text = ""
    kind = type(error)
    # what a template raises itself is a sentence; "division by zero" alone would not be
    is_sentence = text and (kind is ValueError or kind.__module__.startswith("jinja2"))
    return (text if is_sentence else f"{kind.__name__}: {text}".rstrip(": "))[:_LONGEST_ERROR]


def _answer(out: BinaryIO, answer: dict[str, str]) -> None:
    out.write(json.dumps(answer).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
