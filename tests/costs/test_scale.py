"""docs/scale.md is what its formulas say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="lays out files of 800 GB that are holes")
def test_the_tables_of_the_page_are_not_stale(tmp_path):
    done = subprocess.run(
        [sys.executable, "scripts/scale_tables.py", "--check"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
