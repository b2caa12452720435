"""A sample of the points at which `python -m tests.kill_points` kills runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "build --every 41",
        "rerun --every 16",
        "bake --every 11",
        "build rerun bake --every 90 --windows",
    ],
)
def test_killed_at_a_file_operation_the_same_command_gives_the_same_bytes(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_points", *arguments.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-equal" in done.stdout
