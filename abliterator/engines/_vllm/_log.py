"""The reason, in a vLLM server's log, why it ended."""

from __future__ import annotations

import re
from pathlib import Path

_LAST_LINES = 3
_CHARACTERS = 300  # of a line that is shown
# "(EngineCore pid=12) ERROR 11-28 14:24:50 [core.py:842] "
_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?\s*")
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b|\berror: ", re.IGNORECASE)
_CONSEQUENCE = "Engine core initialization failed"
IN_USE = "address already in use"


def log_since(log: Path, start: int) -> str:
    """The text that was written to a log after its first `start` bytes."""
    with log.open("rb") as stream:
        stream.seek(start)
        return stream.read().decode("utf-8", errors="replace")


def reason(written: str) -> str:
    """The first error in a log, and its last lines.

    The process that a user started reports that another one failed; the reason stands before.
    """
    lines = [_PREFIX.sub("", line).rstrip()[:_CHARACTERS] for line in written.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return "It wrote nothing."
    errors = [line for line in lines if _ERROR.search(line) and _CONSEQUENCE not in line]
    last = lines[-_LAST_LINES:]
    shown = [line for line in errors[:1] if line not in last] + last
    return f"Its log says: {' | '.join(shown)}"
