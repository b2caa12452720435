"""Runs the steps of one job of a GitHub workflow on this machine, in a new virtual environment.

Only `run` steps are run; what an action does (`uses`) is named and left to the machine: a checkout
is the working folder, and Python is the one that runs this script. A variable of this process
stands for a step's own of that name, such as another index of packages; an empty one removes it.

    python scripts/run_workflow.py .github/workflows/ci.yml tests --set os=ubuntu-latest \
        --set python=3.11 --set resolution=highest --skip Test
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# An expression that is a name, as `${{ matrix.python }}`; others are not computed here.
_EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


def main() -> int:
    """Exit code: 0, or that of the step that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workflow", type=Path)
    parser.add_argument("job")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="matrix")
    parser.add_argument("--skip", action="append", default=[], metavar="STEP")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the steps run")
    arguments = parser.parse_args()
    workflow = yaml.safe_load(arguments.workflow.read_text("utf-8"))
    values = {
        f"matrix.{name}": value for name, _, value in (s.partition("=") for s in arguments.set)
    }
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        environment = python_environment(Path(folder))
        for step in workflow["jobs"][arguments.job]["steps"]:
            if code := run_step(step, values, environment, arguments.folder, arguments.skip):
                return code
    return 0


def python_environment(folder: Path) -> dict[str, str]:
    """The variables of this process with a virtual environment first in PATH."""
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return {**os.environ, "VIRTUAL_ENV": str(folder), "PATH": path, "CI": "true"}


def run_step(
    step: Mapping[str, Any],
    values: Mapping[str, str],
    environment: Mapping[str, str],
    folder: Path,
    skipped: list[str],
) -> int:
    """Runs one step as GitHub's `shell: bash` does, and returns its exit code."""
    if "run" not in step:
        print(f"== left to the machine: {step['uses']}", flush=True)
        return 0
    name = step.get("name", step["run"])
    if name in skipped or "if" in step:
        print(f"== skipped: {name}", flush=True)
        return 0
    print(f"== {name}", flush=True)
    own = {key: evaluated(value, values) for key, value in step.get("env", {}).items()}
    variables = {**own, **environment}
    for key in own:
        if not variables[key]:
            del variables[key]
    script = evaluated(step["run"], values)
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=variables, check=False).returncode


def evaluated(text: str, values: Mapping[str, str]) -> str:
    """The text with the values of its expressions.

    Raises:
        KeyError: for an expression that has no value here.
    """
    return _EXPRESSION.sub(lambda match: values[match[1]], text)


if __name__ == "__main__":
    sys.exit(main())
