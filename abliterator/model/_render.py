"""Chat templates rendered in a child process, so that time and memory of each are bounded."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from abliterator.errors import GenerationError
from abliterator.processes import child_environment, python_command

SECONDS = 20
"""Time that one rendering may take; the slowest of real templates take milliseconds."""
MEMORY = 1 << 30
"""Bytes by which the process that renders may grow (on Linux)."""


class TemplateFailure(ValueError):
    """A template did not render; the text says why. `render_messages` raises a named error."""


def render_template(request: Mapping[str, Any]) -> str:
    """The text that transformers makes of a chat with a template.

    `request` has the Jinja source as `template`, the chat as `messages`, what else the template may
    read as `variables`, and `continue_last` as in `render_messages`.

    Raises:
        TemplateFailure: for whatever the template does other than write a text: it raises, takes
            more time or memory than it may, or writes without end.
        GenerationError: if the process that renders cannot be started.
    """
    line = json.dumps(request).encode() + b"\n"
    with _lock:
        answer = _running_child().ask(line)
    if "text" not in answer:
        raise TemplateFailure(answer["error"])
    return answer["text"]


class _Child:
    """The process that renders, from its first line to its end."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        script = Path(__file__).with_name("_render_child.py")
        self._process = subprocess.Popen(
            python_command(str(script), str(SECONDS), str(MEMORY)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment({"OMP_NUM_THREADS": "1"}),
        )
        ready = self._read()
        if "error" in ready:
            self.end()
            raise GenerationError(
                "The process that renders chat templates cannot be started: "
                f"{ready['error']} Check that `import transformers` works, and that memory is free."
            )

    @property
    def is_alive(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def ask(self, line: bytes) -> dict[str, str]:
        """The answer to one request; afterwards the process is dead or waits for the next."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(line)
            stdin.flush()
            return self._read()
        except OSError:  # it ended while it was written to
            return self._died()
        except BaseException:
            self.end()  # its answer would be read as that to the next request
            raise

    def _read(self) -> dict[str, str]:
        stdout = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line.endswith(b"\n"):
            return self._died()
        answer: dict[str, str] = json.loads(line)
        return answer

    def _died(self) -> dict[str, str]:
        """Why the process ended: its watchdog exits with 1."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        self.end()
        code = self._process.returncode
        if code == 1:
            return {"error": f"It took more than {SECONDS} seconds."}
        return {"error": f"The process that rendered it ended with exit code {code}."}

    def end(self) -> None:
        """Ends the process, if it runs, and closes its pipes."""
        if self.owner != os.getpid():
            return  # after a fork: the process is the child of the parent
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self._process.kill()  # Python would take half a second to end, and it has nothing to save
        self._process.wait()
        with suppress(OSError):  # what it did not read is lost with it
            stdin.close()
        stdout.close()


_lock = Lock()
_child: _Child | None = None


def _running_child() -> _Child:
    global _child
    if _child is None or not _child.is_alive:
        if _child is not None:
            _child.end()
        else:
            atexit.register(_end)
        _child = None
        _child = _Child()
    return _child


def _end() -> None:
    global _child
    if _child is not None:
        _child.end()
        _child = None
