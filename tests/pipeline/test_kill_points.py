"""A sample of the points at which `python -m tests.kill_points` kills runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "every"), [("build", 41), ("rerun", 16), ("bake", 11)])
def test_killed_at_a_file_operation_the_same_command_gives_the_same_bytes(scenario, every):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_points", scenario, "--every", str(every)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-equal" in done.stdout
