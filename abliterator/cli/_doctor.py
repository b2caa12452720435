"""`abliterator doctor`: prints what a bug report needs of this machine and installation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import click

from abliterator.cli._options import JSON
from abliterator.cli._terminal import LABELS, byte_size, fitted, show

if TYPE_CHECKING:
    from abliterator.diagnostics import Device, Diagnosis, Extra, Hub

OK = "ok"


@click.command(short_help="Show what a bug report needs.")
@click.option("--online", is_flag=True, help="Send one request to the Hub.")
@JSON
def doctor(online: bool, as_json: bool) -> None:
    """Show versions, devices, disk space and Hub login, for a bug report.

    On every device a matrix product is tried in each dtype. Tokens are not shown. Nothing is sent
    to the network without --online.
    """
    from abliterator.diagnostics import diagnose

    show(diagnose(online=online), diagnosis_text, as_json=as_json)


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """A diagnosis in a few lines."""
    return fitted("\n".join(f"{label:<{LABELS}}{text}" for label, text in _lines(diagnosis)))


def _lines(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    versions = dict(diagnosis.versions)
    yield "abliterator", _version(versions.pop("abliterator", None))
    if python := diagnosis.python:
        system = f"{python.platform}, {python.machine}"
        yield "python", f"{python.version} ({python.implementation}) on {system}"
    build = f", built for {diagnosis.torch_build}" if diagnosis.torch_build else ""
    yield "torch", _version(versions.pop("torch", None)) + build
    yield "packages", ", ".join(f"{name} {_version(v)}" for name, v in versions.items())
    yield "imports", _outcomes(diagnosis.imports)
    if host := diagnosis.host:
        memory = f"{byte_size(host.free)} of {byte_size(host.total)} of memory free"
        yield "host", f"{host.cores} CPU cores, {memory}"
    for device in diagnosis.devices:
        yield "device", _device(device)
    for disk in diagnosis.disks:
        refusal = "" if disk.writable == OK else f"; not writable: {disk.writable}"
        yield "disk", f"{byte_size(disk.free)} free in {disk.folder} ({disk.use}){refusal}"
    if diagnosis.hub:
        yield "hub", _hub(diagnosis.hub)
    for text in _extras(diagnosis.extras):
        yield "extras", text
    for fault in diagnosis.faults:
        yield "fault", fault


def _version(version: str | None) -> str:
    return version or "not installed"


def _outcomes(outcomes: Mapping[str, str]) -> str:
    """What succeeded, then what did not, each with its error."""
    succeeded = ", ".join(name for name, outcome in outcomes.items() if outcome == OK)
    failed = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome != OK]
    return "; ".join([f"{succeeded or 'none'} ok", *failed])


def _device(device: Device) -> str:
    memory = ""
    if device.free is not None and device.total is not None:
        memory = f"{byte_size(device.free)} of {byte_size(device.total)} free, "
    name = f" {device.product}," if device.product else ""
    return f"{device.name}:{name} {memory}matrix products {_outcomes(device.products)}"


def _hub(hub: Hub) -> str:
    token = f"token in {hub.token} (not shown)" if hub.token else "no token"
    parts = [hub.endpoint, token]
    if hub.offline:
        parts.append("offline (HF_HUB_OFFLINE)")
    parts.append(hub.answer or "not connected (--online does)")
    return "; ".join(parts)


def _extras(extras: list[Extra]) -> Iterator[str]:
    installed = [f"{extra.package} {extra.version}" for extra in extras if extra.version]
    if installed:
        yield ", ".join(installed)
    for extra in extras:
        if not extra.version:
            yield f"no {extra.package} ({extra.use}): {extra.install}"
