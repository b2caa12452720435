"""A sample of the points at which `python -m tests.kill_points` kills runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EVERY = {"build": 41, "rerun": 16, "bake": 11, "threads": 23}


@pytest.fixture(scope="module")
def done():
    """One process that imports and builds what all scenarios begin with."""
    scenarios = [f"{name}:{every}" for name, every in EVERY.items()]
    return subprocess.run(
        [sys.executable, "-m", "tests.kill_points", *scenarios],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("scenario", EVERY)
def test_killed_at_a_file_operation_the_same_command_gives_the_same_bytes(scenario, done):
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"{scenario}: "))
    assert "bit-equal" in line


@pytest.mark.slow
def test_killed_under_the_rules_of_windows_too():
    command = [sys.executable, "-m", "tests.kill_points"]
    done = subprocess.run(
        [*command, "build", "rerun", "bake", "--every", "90", "--windows"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
