"""Starts Python child processes: safe import path, no secrets, and none outlives its parent.

A child imports nothing from the working folder, whatever lies there, and holds no token, key or
password that it does not need. However its parent ends, it ends too, with all that it started.

    command = python_command("-m", "package")
    with child_process(command, env=child_environment(keep={"HF_TOKEN"}), stderr=log) as child:
        answer = child.stdout.read()
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, NoReturn

HUB_TOKENS = frozenset({"HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"})
"""Variables by which the Hub's client is given a token."""

# A name of a variable of which a word ends so, or is one of these: OPENAI_API_KEY, MYTOKEN, GH_PAT.
_SECRET_WORD = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|COOKIE)S?(_|$)"
    r"|(^|_)(AUTH|PAT|PW)(_|$)"
)
_SECRET_PREFIXES = ("AWS_",)
_NO_SECRETS = frozenset({"HF_HUB_DISABLE_IMPLICIT_TOKEN"})
_PASSWORD_IN_ADDRESS = re.compile(r"://[^/@\s]*:[^/@\s]*@")

KILLED = -9
"""Return code of a child that SIGKILL ended, as the system does where memory is short (POSIX)."""
# Signals that ask a process to end, of whichever the system has: `kill`, the closing of the
# terminal's window on POSIX, and the same with Ctrl-Break on Windows.
_ENDING = ("SIGTERM", "SIGHUP", "SIGBREAK")
_SECONDS_TO_END = 10.0  # from the request to end until a program is killed


class Terminated(SystemExit):
    """The process was asked to end by a signal; what it began is cleaned up on the way out."""


@contextmanager
def ending_by_signal() -> Iterator[None]:
    """Within the block, signals that ask this process to end raise `Terminated`.

    By default they would end it at once, and leave temporary folders behind. A second signal does
    so. Signals that have a handler or are ignored, as by `nohup`, are left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    signals = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
    handled = [number for number in signals if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise Terminated(128 + number)


@contextmanager
def child_process(
    command: Sequence[str], *, env: Mapping[str, str], stderr: IO[Any]
) -> Iterator[subprocess.Popen[str]]:
    """A child process that is waited for, or killed with all that it started if the block raises.

    Its stdout is a pipe to read from. Its stdin is a pipe that this process holds open, and the
    system closes however this process ends: the child is to call `end_with_parent` first. It leads
    a process group of its own, so that Ctrl-C in a terminal reaches this process alone.

    Args:
        command: program and arguments.
        env: its environment.
        stderr: an open file.
    """
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # on Windows
    ) as child:
        try:
            yield child
            child.wait()
        finally:
            _kill_group(child.pid)


def end_with_parent() -> None:
    """Makes this process end, with all that it started, as soon as its stdin is closed.

    For the first step of a process that `child_process` started. From then on, what reads stdin
    gets nothing: on Windows, whoever asks about a pipe waits while another thread reads from it.
    """
    lifeline = os.dup(0)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)

    def wait() -> None:
        with suppress(OSError):
            os.read(lifeline, 1)
        _kill_group(os.getpid())
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def under_parent(command: Sequence[str], *, drop: Collection[str] = ()) -> list[str]:
    """The command of a program that cannot call `end_with_parent`, such as another interpreter.

    A small Python process starts it, with its stdout at stderr, and returns its status. When stdin
    is closed, the program is asked to end, and killed with all that it started if it does not.

    Args:
        command: program and arguments.
        drop: names of environment variables that it does not get, though Python needs them here.
    """
    start = f"from abliterator.processes import run; run({sorted(drop)})"
    return python_command("-c", start, *command)


def run(drop: Collection[str]) -> NoReturn:
    """The process of `under_parent`: runs the program that the command line names."""
    lifeline = os.dup(0)
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    program = subprocess.Popen(sys.argv[1:], env=environment, stdin=subprocess.DEVNULL, stdout=2)
    parent_ended = threading.Event()

    def wait() -> None:
        with suppress(OSError):
            os.read(lifeline, 1)
        parent_ended.set()
        program.terminate()
        time.sleep(_SECONDS_TO_END)
        _kill_group(os.getpid())

    threading.Thread(target=wait, daemon=True).start()
    status = program.wait()
    if parent_ended.is_set():
        _kill_group(os.getpid())  # what the program started, and this process
    sys.exit(status if status >= 0 else 128 - status)


def _kill_group(pid: int) -> None:
    """Kills a process that `child_process` started and its descendants, as far as they run."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # the latter on macOS, of dead ones
            os.killpg(pid, -KILLED)  # those too whose own parent has ended
        return
    import psutil

    with suppress(psutil.Error):
        leader = psutil.Process(pid)
        for process in [*leader.children(recursive=True), leader]:
            with suppress(psutil.Error):
                process.kill()


def python_command(*arguments: str) -> list[str]:
    """The command of a Python process that imports nothing from the working folder.

    Without -P, the folder in which `python -m` is run, or that of a script, comes before all
    installed packages: a file json.py beside a model would run.
    """
    return [sys.executable, "-P", *arguments]


def child_environment(
    changes: Mapping[str, str] | None = None,
    *,
    keep: Collection[str] = (),
    drop: Collection[str] = (),
) -> dict[str, str]:
    """This process's environment without secrets, for a child.

    Args:
        changes: variables to set, which go before those of this process.
        keep: names of secrets that the child needs.
        drop: names of further variables that hold secrets.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in keep or not (name in drop or _is_secret(name, value))
    }
    if "PYTHONPATH" in environment:
        # an empty entry, as in ":/opt/lib", stands for the working folder
        entries = environment.pop("PYTHONPATH").split(os.pathsep)
        if python_path := os.pathsep.join(filter(None, entries)):
            environment["PYTHONPATH"] = python_path
    # as -P, for the processes that the child starts
    return environment | {"PYTHONSAFEPATH": "1"} | dict(changes or {})


def _is_secret(name: str, value: str) -> bool:
    upper = name.upper()
    if upper in _NO_SECRETS:
        return False
    if upper.startswith(_SECRET_PREFIXES) or _SECRET_WORD.search(upper):
        return True
    # a proxy's password is needed to reach anything at all
    return not upper.endswith("_PROXY") and bool(_PASSWORD_IN_ADDRESS.search(value))
