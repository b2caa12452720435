"""Measures a machine in a few seconds."""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from abliterator.costs._machine import Machine, Timing
from abliterator.devices import CPU, device_memory, device_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Clock = Callable[[], float]

_ROWS = (1, 4, 16, 64, 256, 1024)
_WIDTHS = {CPU: (64, 256, 512, 1024, 2048), "accelerator": (64, 1024, 2048, 4096, 8192)}
# Multiplications of one measured product at most; larger ones are extrapolated.
_LARGEST = {CPU: 1 << 30, "accelerator": 1 << 36}
_WEIGHTS = 64 << 20  # bytes of the matrices that take turns, more than most caches hold
_REPEATS = 3
_FILE = 32 << 20  # bytes written to and read from the disk
_MIB = 1 << 20


def calibrate(
    device: str, dtype: str, *, folder: Path | None = None, clock: Clock = perf_counter
) -> Machine:
    """Measures what `Machine` holds: about five seconds on one core, less on an accelerator.

    Args:
        device: as torch names it.
        dtype: of computation, "float32", "bfloat16" or "float16".
        folder: on the disk that is measured; the one of temporary files unless given.
        clock: what times are taken with; `time.process_time` for seconds of the processors.
    """
    import torch
    import transformers  # noqa: F401  (its memory is part of `base_memory`)

    timer = _Timer(torch.device(device), getattr(torch, dtype), clock)
    disk = _disk(folder or Path(tempfile.gettempdir()), clock)
    data = b"\0" * (16 * _MIB)
    products = timer.products()
    bandwidth = timer.bandwidth()
    return Machine(
        device=device,
        name=device_name(device),
        dtype=dtype,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        measured=datetime.now(UTC).date().isoformat(),
        products=products,
        bandwidth=bandwidth,
        fresh=_fresh(clock),
        hashing=len(data) / _median(lambda: hashlib.sha256(data), clock),
        python=_median(_python_loop, clock),
        base_memory=_resident(),
        memory=device_memory(device).total,
        accelerator=device != CPU,
        **disk,
        **_blocks(timer, products),
    )


class _Timer:
    """Seconds of operations on one device in one dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype, clock: Clock) -> None:
        self.device, self.dtype, self.clock = device, dtype, clock
        self.kind = CPU if device.type == CPU else "accelerator"

    def seconds(self, run: Callable[[], Any], repeats: int = _REPEATS) -> float:
        """The median over repeats, after one that does not count."""
        import torch

        def whole() -> None:
            run()
            if self.kind != CPU:
                torch.get_device_module(self.device).synchronize()

        whole()
        return _median(whole, self.clock, repeats)

    def products(self) -> tuple[Timing, ...]:
        """Products of the table, each with matrices that take turns so that no cache holds them."""
        import torch

        timings = []
        for width in _WIDTHS[self.kind]:
            size = width * width * self.dtype.itemsize
            weights = torch.full(
                (max(1, _WEIGHTS // size), width, width), 1e-3, device=self.device, dtype=self.dtype
            )
            for rows in (r for r in _ROWS if r * width * width <= _LARGEST[self.kind]):
                turns = min(len(weights), max(2, _LARGEST[self.kind] // (32 * rows * width**2)))
                x = torch.ones(rows, width, device=self.device, dtype=self.dtype)
                used = weights[:turns]
                seconds = self.seconds(partial(_multiply, x, used))
                timings.append(Timing(rows=rows, width=width, seconds=seconds / turns))
        return tuple(timings)

    def bandwidth(self) -> float:
        """Bytes a second that a copy of 64 MiB reads and writes."""
        import torch

        source = torch.ones(_WEIGHTS, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * _WEIGHTS / self.seconds(lambda: target.copy_(source))

    def forward(self, model: PreTrainedModel, rows: int, tokens: int) -> float:
        """Seconds of a forward pass without cache."""
        import torch

        ids = torch.zeros(rows, tokens, dtype=torch.long, device=self.device)
        with torch.inference_mode():
            return self.seconds(lambda: model(ids, use_cache=False, logits_to_keep=1))

    def generation(self, model: PreTrainedModel, tokens: int) -> float:
        """Seconds of a step of `generate`, after the first."""
        import torch

        ids = torch.zeros(1, 8, dtype=torch.long, device=self.device)
        mask = torch.ones_like(ids)

        def run(n: int) -> float:
            options: dict[str, Any] = {"do_sample": False, "min_new_tokens": n, "pad_token_id": 0}
            with torch.inference_mode():
                return self.seconds(
                    lambda: model.generate(ids, attention_mask=mask, max_new_tokens=n, **options)
                )

        return (run(tokens) - run(2)) / (tokens - 2)


def _blocks(timer: _Timer, products: tuple[Timing, ...]) -> dict[str, float]:
    """Overheads of blocks, passes and steps, from small Llamas with random weights.

    The difference of two depths is what the blocks take, the rest is the pass's own. A narrow model
    shows overheads alone; what a wide one takes beside its products grows with its tokens.
    """
    shallow, deep = (_llama(timer, 64, layers) for layers in (1, 5))
    one, five = (timer.forward(model, 1, 8) for model in (shallow, deep))
    block = max(0.0, five - one) / 4
    step = timer.generation(shallow, 10)
    width, rows, tokens = 512, 8, 32
    few, more = (_llama(timer, width, layers) for layers in (1, 3))
    wide = (timer.forward(more, rows, tokens) - timer.forward(few, rows, tokens)) / 2
    of_products = sum(
        _seconds(products, rows * tokens, width) * share for share in (4, 12)
    )  # attention: four squares; MLP: three of width x 4 width
    # an accelerator computes while the next call is prepared
    beside = wide - of_products - (block if timer.kind == CPU else 0.0)
    return {
        "block_overhead": block,
        "pass_overhead": max(0.0, one - block),
        "step_overhead": max(0.0, step - one),
        "stream": max(0.0, beside) / (rows * tokens * width),
    }


def _multiply(x: torch.Tensor, weights: torch.Tensor) -> None:
    from torch.nn.functional import linear

    for weight in weights:
        linear(x, weight)


def _seconds(products: tuple[Timing, ...], rows: int, width: int) -> float:
    near = [t for t in products if t.rows == rows]
    nearest = min(near, key=lambda t: abs(t.width - width))
    return nearest.seconds * (width / nearest.width) ** 2


def _llama(timer: _Timer, width: int, layers: int) -> PreTrainedModel:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        vocab_size=64,
    )
    with torch.device(timer.device):
        return LlamaForCausalLM(config).to(timer.dtype).eval()


def _median(run: Callable[[], Any], clock: Clock, repeats: int = _REPEATS) -> float:
    seconds = []
    for _ in range(repeats):
        start = clock()
        run()
        seconds.append(clock() - start)
    return max(1e-9, statistics.median(seconds))


def _python_loop() -> int:
    return sum(len(str(i)) for i in range(300_000))


def _disk(folder: Path, clock: Clock) -> dict[str, float]:
    """Bytes a second read (of a file written just before, kept by the system or not) and written.

    What is written is flushed. Only Linux can be asked to keep nothing.
    """
    data = os.urandom(_MIB)
    with tempfile.TemporaryFile(dir=folder) as file:

        def write() -> None:
            file.seek(0)
            for _ in range(_FILE // _MIB):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())

        def read() -> None:
            file.seek(0)
            while file.read(_MIB):
                pass

        def read_uncached() -> None:
            if sys.platform == "linux":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            read()

        runs = {"disk_write": write, "disk_read": read, "uncached_read": read_uncached}
        return {name: _FILE / _median(run, clock) for name, run in runs.items()}


def _fresh(clock: Clock) -> float:
    """Bytes a second of float32 made from bfloat16 in memory that is new to the process."""
    import torch

    stored = torch.ones(_WEIGHTS // 4, dtype=torch.bfloat16)
    return _WEIGHTS / _median(lambda: stored.float(), clock)


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
