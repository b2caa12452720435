"""Versions, processors, memory, disks and optional packages."""

from __future__ import annotations

import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from abliterator.devices import usable_cores
from abliterator.diagnostics._faults import outcome, without_home
from abliterator.diagnostics._report import Disk, Extra, Host, Python
from abliterator.files import free_bytes

PACKAGES = (
    "abliterator",
    "torch",
    "transformers",
    "lm-eval",
    "safetensors",
    "huggingface-hub",
    "datasets",
    "tokenizers",
    "accelerate",
    "numpy",
)

# What is used where it is installed: package, use, and what pip installs it.
_OPTIONAL = (
    ("matplotlib", "pictures of a sweep", "abliterator[plots]"),
    ("ray", "workers on several machines", "abliterator[ray]"),
    ("tenacity", "benchmarks through a server", "lm-eval[api]"),
    ("vllm", "benchmarks with vLLM", "lm-eval[vllm]"),
    ("sentencepiece", "models with a tokenizer.model alone", "sentencepiece protobuf"),
    ("tiktoken", "models with a .tiktoken file alone", "tiktoken"),
)


def python() -> Python:
    """The interpreter that runs this."""
    return Python(
        version=platform.python_version(),
        implementation=platform.python_implementation(),
        platform=platform.platform(),
        machine=platform.machine(),
    )


def package_version(package: str) -> str | None:
    """The installed version of a package; None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def host() -> Host:
    """Processors that this process may use, and the machine's memory."""
    import psutil

    memory = psutil.virtual_memory()
    return Host(cores=usable_cores(), free=memory.available, total=memory.total)


def disk(folder: Path, use: str) -> Disk:
    """Free disk space for a folder that is there or would be made, and whether it can be written.

    A file without a name is written to the folder, or to the nearest one that is there.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent

    def write() -> None:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0")

    return Disk(
        folder=without_home(str(folder)),
        use=use,
        free=free_bytes(existing),
        writable=outcome(write),
    )


def extras() -> list[Extra]:
    """The optional packages."""
    return [
        Extra(package, use, package_version(package), f"pip install {_quoted(install)}")
        for package, use, install in _OPTIONAL
    ]


def _quoted(requirement: str) -> str:
    return f"'{requirement}'" if "[" in requirement else requirement
