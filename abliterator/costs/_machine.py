"""What a machine can do: rates that were measured on it, or assumed of one that is not here."""

from __future__ import annotations

import math
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict


class Timing(BaseModel):
    """Seconds of one product of `rows` vectors with a square matrix of `width`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    width: int
    seconds: float


class Machine(BaseModel):
    """Rates of one device in one dtype; `calibrate` measures them, `assumed` has those of others.

    Attributes:
        device: as torch names it.
        name: of the product.
        dtype: of computation.
        torch: version of torch.
        threads: that computed.
        measured: date (ISO); "" where the rates are assumed.
        products: seconds of products, for numbers of rows times widths of square matrices.
        block_overhead: seconds of a block's calls beside its products, however few its tokens.
        pass_overhead: seconds of a forward pass beside its blocks.
        step_overhead: seconds of one step of `generate` beside its forward pass.
        stream: seconds a number of the residual stream and block, beside the products.
        bandwidth: bytes a second that a copy in memory reads and writes.
        fresh: bytes a second written to host memory that the process did not have before.
        disk_read: bytes a second, of files that the system may keep in memory.
        uncached_read: bytes a second from the disk itself, where the system can be made to.
        disk_write: bytes a second, flushed.
        hashing: bytes a second of SHA-256.
        python: seconds of a fixed loop of Python, by which times of Python code are scaled.
        base_memory: bytes of a process that has imported torch and transformers.
        memory: bytes of the device, all of them.
        accelerator: whether calls return before the device has computed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    name: str
    dtype: str
    torch: str
    threads: int
    measured: str
    products: tuple[Timing, ...]
    block_overhead: float
    pass_overhead: float
    step_overhead: float
    stream: float
    bandwidth: float
    fresh: float
    disk_read: float
    uncached_read: float
    disk_write: float
    hashing: float
    python: float
    base_memory: int
    memory: int
    accelerator: bool = False

    def product_seconds(self, rows: float, inner: int, outer: int) -> float:
        """Seconds of [rows, inner] x [inner, outer].

        Measured seconds a multiplication, interpolated in the logarithms of rows and width (the
        geometric mean of inner and outer); beyond the table, those of its edge.
        """
        if rows <= 0:
            return 0.0
        width = math.sqrt(inner * outer)
        low, high, share = _between(width, sorted({t.width for t in self.products}))
        a_multiplication = _mix(
            self._a_multiplication(rows, low), self._a_multiplication(rows, high), share
        )
        return rows * inner * outer * a_multiplication

    def _a_multiplication(self, rows: float, width: int) -> float:
        timings = {t.rows: t.seconds for t in self.products if t.width == width}
        low, high, share = _between(rows, sorted(timings))
        return _mix(timings[low] / (low * width**2), timings[high] / (high * width**2), share)


class Assumed(NamedTuple):
    """Published peaks of an accelerator, and the shares of them that are reached.

    Attributes:
        name: of the product.
        flops: a second, bfloat16 without sparsity.
        bandwidth: bytes a second.
        memory: bytes.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int


# Shares of the published peaks: dense products of transformers reach about half of the peak of
# compute, kernels that stream weights about two thirds of that of memory.
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.5, 0.65

# NVIDIA's data sheets (H100 SXM, A100 80GB SXM, L40S, H200).
ACCELERATORS = {
    "l40s": Assumed("L40S", 362e12, 0.864e12, 48 << 30),
    "a100": Assumed("A100 80GB", 312e12, 2.04e12, 80 << 30),
    "h100": Assumed("H100 80GB", 989e12, 3.35e12, 80 << 30),
    "h200": Assumed("H200 141GB", 989e12, 4.8e12, 141 << 30),
}

_ROWS = (1, 4, 16, 64, 256, 1024, 4096)
_WIDTHS = (64, 1024, 16384)


def assumed(accelerator: Assumed) -> Machine:
    """The rates of an accelerator by its data sheet, in a host with NVMe disks.

    A product takes what its arithmetic or the reading of its matrix takes, whichever is longer;
    overheads are those of transformers' eager code, which a faster device does not shorten.
    """
    flops = COMPUTE_SHARE * accelerator.flops
    bandwidth = BANDWIDTH_SHARE * accelerator.bandwidth
    products = tuple(
        Timing(
            rows=rows,
            width=width,
            seconds=max(2 * rows * width**2 / flops, 2 * width**2 / bandwidth),
        )
        for rows in _ROWS
        for width in _WIDTHS
    )
    return Machine(
        device="cuda:0",
        name=accelerator.name,
        dtype="bfloat16",
        torch="",
        threads=1,
        measured="",
        products=products,
        block_overhead=6e-4,
        pass_overhead=1e-3,
        step_overhead=1e-3,
        stream=80 / bandwidth,
        bandwidth=bandwidth,
        fresh=24e9,
        disk_read=3e9,
        uncached_read=3e9,
        disk_write=2e9,
        hashing=1.5e9,
        python=REFERENCE,
        base_memory=1 << 30,
        memory=accelerator.memory,
        accelerator=True,
    )


# Seconds of the loop of Python on the machine on which times of Python code were measured.
REFERENCE = 0.015


def _between(value: float, points: list[int]) -> tuple[int, int, float]:
    """The two points around a value, and its place between their logarithms, 0 to 1."""
    above = next((p for p in points if p >= value), points[-1])
    below = next((p for p in reversed(points) if p <= value), points[0])
    if above == below:
        return below, above, 0.0
    return below, above, math.log(value / below) / math.log(above / below)


def _mix(low: float, high: float, share: float) -> float:
    return math.exp((1 - share) * math.log(low) + share * math.log(high))
