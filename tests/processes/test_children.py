"""No child outlives its parent: real processes, ended in every way that the system has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from abliterator.processes import (
    KILLED,
    _kill_group,
    child_environment,
    child_process,
    ending_by_signal,
    python_command,
    under_parent,
)

# A child that starts one of its own, as lm-eval's workers are, and says which two they are.
CHILD = """
import os, subprocess, sys, time
from abliterator.processes import end_with_parent
end_with_parent()
sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
worker = subprocess.Popen(sleep, stdout=subprocess.DEVNULL)
print(os.getpid(), worker.pid, flush=True)
{then}
"""
WAIT = "time.sleep(100)"
PARENT = """
import signal, sys, tempfile
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and below `nohup`
from abliterator.cli import main
from abliterator.processes import child_environment, child_process, python_command

@main.command()
def wait():
    with tempfile.TemporaryDirectory(dir=sys.argv[2]):
        command = python_command("-c", sys.argv[3])
        with child_process(command, env=child_environment(), stderr=sys.stderr) as child:
            print(child.stdout.readline(), end="", flush=True)
            child.stdout.read()

main(sys.argv[1:2])
"""


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def require_ended(pids: list[int]) -> None:
    """All of them end within seconds; afterwards none runs, whatever the outcome."""
    end = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def start_parent(scratch: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A command that waits for a child, and the two processes below it."""
    arguments = ["wait", str(scratch), CHILD.format(then=WAIT)]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    return parent, [int(pid) for pid in parent.stdout.readline().split()]


@pytest.mark.parametrize(
    ("number", "status", "leaves"),
    [
        (signal.SIGINT, 130, []),  # Ctrl-C
        (signal.SIGHUP, 129, []),  # the window is closed
        (signal.SIGTERM, 143, []),
        (signal.SIGKILL, -9, ["its scratch folder"]),
    ],
)
def test_a_command_that_is_ended_leaves_no_process_and_no_scratch(tmp_path, number, status, leaves):
    parent, below = start_parent(tmp_path)
    try:
        assert len(below) == 2
        assert all(map(is_running, below))
        parent.send_signal(number)
        parent.communicate(timeout=30)
    finally:
        parent.kill()
    require_ended(below)
    assert parent.returncode == status
    assert len(list(tmp_path.iterdir())) == len(leaves)


def test_signals_that_are_ignored_stay_ignored():
    """As by `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_by_signal():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def run_child(then: str, **options) -> tuple[list[int], int]:
    command = python_command("-c", CHILD.format(then=then))
    with child_process(command, env=child_environment(), stderr=sys.__stderr__) as child:
        assert child.stdout is not None
        below = [int(pid) for pid in child.stdout.readline().split()]
    return below, child.returncode


@pytest.mark.parametrize(
    ("then", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", KILLED)]
)
def test_what_a_child_started_ends_with_it(then, status):
    """Its worker has another parent by then."""
    below, code = run_child(then)
    require_ended(below)
    assert code == status


def test_a_child_reads_nothing_from_its_stdin():
    command = python_command("-c", CHILD.format(then="print(repr(sys.stdin.read()))"))
    with child_process(command, env=child_environment(), stderr=sys.__stderr__) as child:
        assert child.stdout is not None
        assert child.stdout.read().splitlines()[1] == "''"


def run_under_parent(script: str, errors: Path, *, drop=()) -> int:
    """The status of a program that knows nothing of its parent, under a parent that waits."""
    command = under_parent([sys.executable, "-c", script], drop=drop)
    with (
        errors.open("w") as stderr,
        child_process(command, env=child_environment({"A_VARIABLE": "1"}), stderr=stderr) as child,
    ):
        pass
    return child.returncode


def test_a_program_under_its_parent_has_its_status_and_writes_to_stderr(tmp_path):
    script = "import os, sys; print(os.environ.get('A_VARIABLE'), flush=True); sys.exit(3)"
    assert run_under_parent(script, tmp_path / "log") == 3
    assert (tmp_path / "log").read_text() == "1\n"
    assert run_under_parent(script, tmp_path / "log", drop=["A_VARIABLE"]) == 3
    assert (tmp_path / "log").read_text() == "None\n"
    assert run_under_parent("import os; os.kill(os.getpid(), 9)", tmp_path / "log") == 137


def test_a_program_under_its_parent_is_asked_to_end_first(tmp_path):
    script = """if True:
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("ended in order", flush=True)))
        print("runs", flush=True)
        time.sleep(100)
    """
    log = tmp_path / "log"
    command = under_parent([sys.executable, "-c", script])
    with (
        log.open("w") as stderr,
        child_process(command, env=child_environment(), stderr=stderr) as child,
    ):
        while "runs" not in log.read_text():
            time.sleep(0.02)
        assert child.stdin is not None
        child.stdin.close()
    assert log.read_text() == "runs\nended in order\n"


def test_without_process_groups_descendants_are_looked_for(monkeypatch):
    """As on Windows."""
    monkeypatch.delattr(os, "killpg")
    below = []

    def interrupted():
        command = python_command("-c", CHILD.format(then=WAIT))
        with child_process(command, env=child_environment(), stderr=sys.__stderr__) as child:
            assert child.stdout is not None
            below.extend(int(pid) for pid in child.stdout.readline().split())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    require_ended(below)
    _kill_group(below[0])  # nothing is left: no error
