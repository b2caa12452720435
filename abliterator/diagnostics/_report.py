"""The types of a diagnosis. Sizes are in bytes; None is what could not be found out."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Python:
    """The interpreter and the system that it was made for."""

    version: str
    implementation: str
    platform: str
    machine: str  # of the interpreter, which can be another than the processor's


@dataclass(frozen=True)
class Host:
    """Processors and memory."""

    cores: int | None
    free: int
    total: int


@dataclass
class Device:
    """One device, and the tries on it.

    Attributes:
        name: as torch names it.
        product: what its driver calls it.
        free: memory that is free.
        total: all its memory.
        products: "ok" for each dtype in which a matrix product was right, else what went wrong.
    """

    name: str
    product: str | None = None
    free: int | None = None
    total: int | None = None
    products: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Disk:
    """A folder that is written to, or would be made, and the disk that it is on."""

    folder: str
    use: str
    free: int
    writable: str  # "ok", or why not


@dataclass(frozen=True)
class Hub:
    """The Hugging Face Hub, as its client is set up here.

    Attributes:
        endpoint: its address.
        token: where a token was found, never the token itself; None where there is none.
        offline: whether the client is forbidden to connect.
        answer: to one request; None where none was made.
    """

    endpoint: str
    token: str | None
    offline: bool
    answer: str | None


@dataclass(frozen=True)
class Extra:
    """A package that only some uses need: its version if it is installed, and how to install it."""

    package: str
    use: str
    version: str | None
    install: str


@dataclass
class Diagnosis:
    """All that was found out.

    Attributes:
        python: the interpreter.
        versions: of packages; None for one that is not installed.
        torch_build: what torch was built for, such as "CUDA 13.0" or "CPU".
        imports: "ok" for each package that can be imported, else what went wrong.
        host: processors and memory.
        devices: the CPU, then accelerators.
        disks: the working folder, and the Hub's cache.
        hub: how the Hub's client is set up.
        extras: optional packages.
        faults: what else went wrong, a line each.
    """

    python: Python | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    torch_build: str | None = None
    imports: dict[str, str] = field(default_factory=dict)
    host: Host | None = None
    devices: list[Device] = field(default_factory=list)
    disks: list[Disk] = field(default_factory=list)
    hub: Hub | None = None
    extras: list[Extra] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
