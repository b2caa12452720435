"""Several commands in one environment, each in a fork of one process that has imported everything.

The process is a real one: its interpreter starts in that environment, with its locale and flags. A
fork of it reads its own stdin, writes its own stdout and stderr, and ends with its own exit status.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# The parent makes no tensor: torch must have no threads where a process forks.
_PARENT = """
import gc, importlib, json, os, sys
from abliterator.cli import main
for name in (
    "abliterator.pipeline", "scipy.optimize", "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(name)
gc.collect()
gc.freeze()
statuses = []
for number, arguments in enumerate(json.loads(sys.argv[1])):
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        for stream, name in enumerate(("stdin", "stdout", "stderr")):
            flags = os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT
            os.dup2(os.open(os.path.join(sys.argv[2], f"{number}.{name}"), flags), stream)
        main(arguments, prog_name="abliterator")
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


class Ended(NamedTuple):
    """How a command ended, as `subprocess.CompletedProcess` says it."""

    returncode: int
    stdout: bytes
    stderr: bytes


def run_commands(
    commands: Sequence[tuple[Sequence[str], bytes]], *, env: Mapping[str, str], cwd: Path
) -> list[Ended]:
    """Runs `abliterator ARGUMENTS` for each (arguments, stdin), one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        for number, (_, stdin) in enumerate(commands):
            (Path(folder) / f"{number}.stdin").write_bytes(stdin)
        jobs = json.dumps([list(map(str, arguments)) for arguments, _ in commands])
        done = subprocess.run(
            [sys.executable, "-c", _PARENT, jobs, folder],
            env={"OMP_NUM_THREADS": "1", **env, "PYTHONPATH": str(ROOT)},
            cwd=cwd,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert done.stderr == b""
        return [
            Ended(
                status,
                *(Path(folder, f"{number}.{name}").read_bytes() for name in ("stdout", "stderr")),
            )
            for number, status in enumerate(json.loads(done.stdout))
        ]
