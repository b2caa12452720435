"""Collects a diagnosis: what the child process tried, and what needs no try."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

from abliterator.diagnostics._faults import noted, without_home
from abliterator.diagnostics._hub import cache_folder, hub
from abliterator.diagnostics._machine import PACKAGES, disk, extras, host, package_version, python
from abliterator.diagnostics._report import Device, Diagnosis
from abliterator.files import shown
from abliterator.processes import child_environment, python_command

_SECONDS = 300.0  # for all imports and tries, on a machine that is busy


def diagnose(*, online: bool = False) -> Diagnosis:
    """What this machine and its installation offer; errors are entries of the result.

    Args:
        online: whether to send one request to the Hub.
    """
    diagnosis = Diagnosis()
    faults = diagnosis.faults
    with noted(faults, "python"):
        diagnosis.python = python()
    with noted(faults, "versions"):
        diagnosis.versions = {package: package_version(package) for package in PACKAGES}
    with noted(faults, "host"):
        diagnosis.host = host()
    with noted(faults, "devices"):
        add_tries(diagnosis, python_command("-m", "abliterator.diagnostics._child"))
    with noted(faults, "working folder"):
        diagnosis.disks.append(disk(Path.cwd(), "working folder"))
    with noted(faults, "cache of the Hub"):
        diagnosis.disks.append(disk(cache_folder(), "cache of the Hub"))
    with noted(faults, "hub"):
        diagnosis.hub = hub(online=online)
    with noted(faults, "extras"):
        diagnosis.extras = extras()
    return diagnosis


def add_tries(diagnosis: Diagnosis, command: list[str], *, timeout: float = _SECONDS) -> None:
    """Adds what a child process tried, as far as it came.

    Args:
        diagnosis: gets imports, devices and faults.
        command: prints results as `abliterator.diagnostics._child` does.
        timeout: seconds after which the child is ended.
    """
    try:
        child = subprocess.run(
            command, env=child_environment(), capture_output=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as expired:
        lines, end = _lines(expired.stdout), f"did not end in {timeout:.0f} s"
    else:
        lines = _lines(child.stdout)
        end = _ended(child.returncode, child.stderr) if child.returncode else ""
    began = "starting"
    for line in lines:
        began = line.pop("begin", began)
        _add(diagnosis, line)
    if end:
        diagnosis.faults.append(f"{began}: the process {end}")


def _lines(stdout: bytes | None) -> list[dict[str, Any]]:
    text = (stdout or b"").decode("utf-8", "replace")
    return [
        json.loads(line) for line in text.splitlines() if line.startswith("{") and line[-1] == "}"
    ]


def _ended(code: int, stderr: bytes) -> str:
    """How a child ended that was to end with 0."""
    if code < 0:
        return f"ended with signal {signal.Signals(-code).name}"
    last = without_home(stderr.decode("utf-8", "replace").strip().rpartition("\n")[2])
    number = hex(code) if code > 255 else str(code)  # Windows' codes of crashes are known in hex
    return f"ended with exit code {number}" + (f": {shown(last)}" if last else "")


def _add(diagnosis: Diagnosis, line: dict[str, Any]) -> None:
    match line:
        case {"import": name, "outcome": outcome}:
            diagnosis.imports[name] = outcome
        case {"torch_build": build}:
            diagnosis.torch_build = build
        case {"fault": fault}:
            diagnosis.faults.append(fault)
        case {"device": name, "dtype": dtype, "outcome": outcome}:
            diagnosis.devices[-1].products[dtype] = outcome
        case {"device": name, "product": product}:
            diagnosis.devices[-1].product = product
        case {"device": _, "free": free, "total": total}:
            diagnosis.devices[-1].free, diagnosis.devices[-1].total = free, total
        case {"device": name}:
            diagnosis.devices.append(Device(name))
