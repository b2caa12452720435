"""The measured rates of machines, in the user's cache folder."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from abliterator.costs._machine import Machine
from abliterator.errors import FileError
from abliterator.files import cache_folder, digest_of, read_text, write_text_atomic

# Raised when `Machine` or what `calibrate` measures changes.
_VERSION = 3


def known_machine(device: str, dtype: str) -> Machine | None:
    """The rates that were measured on this machine with this torch; None where there are none.

    torch is not imported.
    """
    try:
        return Machine.model_validate_json(read_text(_file(device, dtype)))
    except (FileError, ValidationError):
        return None


def remember(machine: Machine) -> None:
    """Keeps the rates for `known_machine`."""
    file = _file(machine.device, machine.dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, machine.model_dump_json(indent=1) + "\n")


def _file(device: str, dtype: str) -> Path:
    """By host, processors, threads, device, dtype and version of torch."""
    threads = os.environ.get("OMP_NUM_THREADS")
    host = [platform.node(), platform.machine(), platform.processor(), os.cpu_count(), threads]
    key = digest_of([_VERSION, host, device, dtype, version("torch")])
    return cache_folder() / "machines" / f"{key[:16]}.json"
