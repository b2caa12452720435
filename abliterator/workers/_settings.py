"""Where workers run, and how many there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from abliterator.devices import AUTO, BALANCED, CPU, available_devices, choose_device
from abliterator.errors import WorkerError
from abliterator.workers._local import LocalWorker
from abliterator.workers._pool import Pool
from abliterator.workers._types import Worker

if TYPE_CHECKING:
    from abliterator.workers._ray import Share


@dataclass(frozen=True)
class PoolSettings:
    """A pool that is to be opened.

    Attributes:
        ray: address of a Ray cluster, or "auto"; None is this machine, without Ray.
        workers: how many; None is one for each GPU, and on CPUs one for each node of the cluster.
        device: that each worker computes on, as torch names it, or "auto".
        secrets: names of environment variables with secrets that processes of this machine get;
            those of a cluster have the environment that their node was started with.

    Raises:
        WorkerError: for numbers and devices that workers cannot have.
    """

    ray: str | None = None
    workers: int | None = None
    device: str = AUTO
    secrets: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.device == BALANCED or ":" in self.device:
            raise WorkerError(
                f"Each worker has one device of its own, and `--device {self.device}` names "
                "others. Use `--device auto`, `--device cuda` or `--device cpu` with workers."
            )

    @property
    def compute_device(self) -> str:
        """The kind of device that workers compute on."""
        if self.ray is None:
            return choose_device(self.device)
        from abliterator.workers._ray import gpus_of

        if self.device == CPU:
            return CPU
        if gpus_of(self.nodes):
            return "cuda" if self.device == AUTO else self.device
        if self.device != AUTO:
            raise WorkerError(
                f"No node of the Ray cluster has a GPU, and `--device {self.device}` asks for one. "
                "Use `--device cpu`, or add nodes with GPUs."
            )
        return CPU

    def require_room(self) -> None:
        """Checks that there is room for the workers, before any of them is started.

        Raises:
            WorkerError: if there is not.
        """
        if self.ray is None:
            self.devices()
        else:
            self.share()

    def at_most(self, workers: int) -> PoolSettings:
        """The same with no more workers than so many."""
        there = len(self.devices()) if self.ray is None else self.share().workers
        return replace(self, workers=min(there, workers))

    def share(self) -> Share:
        """What each worker gets of the Ray cluster."""
        from abliterator.workers._ray import share_of

        return share_of(self.nodes, workers=self.workers, on_cpu=self.compute_device == CPU)

    def devices(self) -> list[str]:
        """The device of each worker on this machine."""
        kind = choose_device(self.device)
        devices = [name for name in available_devices() if name.split(":")[0] == kind]
        wanted = self.workers or len(devices)
        if kind == CPU:
            devices *= wanted
        if wanted > len(devices):
            raise WorkerError(
                f"This machine has {len(devices)} devices of kind {kind}, and {wanted} workers "
                f"need one each. Use `--workers {len(devices)}`, or `--device cpu`."
            )
        return devices[:wanted]

    @property
    def hardware(self) -> str | None:
        """Names of the cluster's devices; None for those of this machine."""
        if self.ray is None:
            return None
        from abliterator.workers._ray import hardware_of

        return hardware_of(self.nodes)

    @cached_property
    def nodes(self) -> list[Mapping[str, float]]:
        """The resources of each node of the Ray cluster, which is joined first."""
        from abliterator.workers._ray import connect

        return connect(self.ray or AUTO)


def open_pool(settings: PoolSettings) -> Pool:
    """Starts workers.

    Raises:
        WorkerError: if there is no room for them, or Ray is not installed.
    """
    return Pool(_ray_workers(settings) if settings.ray else _local_workers(settings))


def _ray_workers(settings: PoolSettings) -> list[Worker]:
    from abliterator.workers._ray import ray_workers

    return ray_workers(settings.share(), device=settings.compute_device)


def _local_workers(settings: PoolSettings) -> list[Worker]:
    import torch

    devices = settings.devices()
    threads = max(1, torch.get_num_threads() // len(devices))
    return [LocalWorker(i, device, threads, settings.secrets) for i, device in enumerate(devices)]
