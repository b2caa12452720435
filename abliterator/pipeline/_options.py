"""What a run computes with: device, dtype, memory, workers. None of it is part of the recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from abliterator.checkpoint import Checkpoint
from abliterator.devices import AUTO, BALANCED, available_devices, choose_device, device_name
from abliterator.errors import WorkerError
from abliterator.pipeline._planning._where import is_computed_in_float32
from abliterator.processes import HUB_TOKENS
from abliterator.workers import PoolSettings


@dataclass(frozen=True)
class Options:
    """Device, dtype and folder of a run; none of them is part of the recipe.

    Attributes:
        device: a torch device; "auto", one accelerator or what the model needs beside it; or
            "balanced", all accelerators.
        dtype: dtype of computation ("float32", "bfloat16", "float16"), or "auto": as stored on an
            accelerator; on a CPU float32 where it fits in half the memory, because CPUs are faster
            at it.
        max_memory: bytes of weights on each accelerator and in host memory at most; None is a
            share of what is free.
        force: go on in a folder that another recipe made.
        vllm_python: the interpreter that has vLLM, instead of the recipe's.
        ray: address of a Ray cluster whose workers hold the model, or "auto".
        workers: how many workers hold the model; None without `ray` is this process alone.
    """

    device: str = AUTO
    dtype: str = "auto"
    max_memory: int | None = None
    force: bool = False
    vllm_python: str | None = None
    ray: str | None = None
    workers: int | None = None

    @property
    def divides(self) -> bool:
        """Whether workers hold the model."""
        return self.ray is not None or self.workers is not None

    @cached_property
    def pool(self) -> PoolSettings | None:
        """The workers that hold the model; None for this process alone.

        Raises:
            WorkerError: for numbers, devices and addresses that workers cannot have.
        """
        if not self.divides:
            return None
        if self.max_memory is not None:
            raise WorkerError(
                "`--max-memory` spreads one model over several devices, and each worker holds all "
                "of its model on one. Leave it out, or use neither `--workers` nor `--ray`."
            )
        return PoolSettings(self.ray, self.workers, self.device, HUB_TOKENS)  # tasks have datasets

    @property
    def compute_device(self) -> str:
        """The first device that computes, as torch names it.

        Raises:
            RecipeError: if this machine has no such device.
            WorkerError: if the workers' cluster has none.
        """
        if self.pool is not None:
            return self.pool.compute_device
        return choose_device(AUTO if self.device == BALANCED else self.device)

    @property
    def weights(self) -> dict[str, Any]:
        """Where weights may lie, as arguments of `load_model`."""
        device = self.device if self.device in (AUTO, BALANCED) else self.compute_device
        return {"device": device, "max_memory": self.max_memory}

    def hardware(self, spread_over: Collection[str] = ()) -> str:
        """Names of the devices that compute, for the record.

        Args:
            spread_over: devices that weights were spread over, if it is known.
        """
        if self.pool is not None and self.pool.hardware is not None:
            return self.pool.hardware
        accelerators = available_devices()[:-1]
        devices = [device for device in accelerators if device in spread_over]
        if not devices and self.device == BALANCED:
            devices = accelerators
        devices = devices or [self.compute_device]
        counts = Counter(map(device_name, devices))
        return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in counts.items())

    def compute_dtype(self, checkpoint: Checkpoint) -> str | None:
        """The dtype in which a checkpoint is computed; None is the stored one."""
        if self.dtype != "auto":
            return self.dtype
        fits = is_computed_in_float32(checkpoint, self.compute_device)
        return "float32" if fits else None
