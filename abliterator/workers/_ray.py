"""Workers that are actors of a Ray cluster, one for each GPU or for a share of the CPUs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from abliterator.devices import AUTO, choose_device
from abliterator.errors import WorkerError
from abliterator.workers._local import divide_threads
from abliterator.workers._types import (
    Job,
    JobRunner,
    NumberedJob,
    Outcome,
    Resident,
    Worker,
    WorkerLost,
)

START = 120.0  # seconds in which the cluster must have room for all workers
_POLL = 0.5
_KIND_OF_GPU = "accelerator_type:"

# Ray reports how it is used, serves a dashboard and prints on stdout unless it is told not to.
_SILENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SCHEDULER_EVENTS": "0",
}


class Share(NamedTuple):
    """How many workers a cluster gets, and what each of them has."""

    workers: int
    gpus: int  # a worker
    threads: int  # a worker


def connect(address: str) -> list[Mapping[str, float]]:
    """Joins a Ray cluster; returns the resources of each of its nodes.

    Args:
        address: of its head; "auto" is the one that runs here, or a new one of this machine alone.

    Raises:
        WorkerError: if Ray is not installed, or no cluster answers there.
    """
    os.environ.update({name: value for name, value in _SILENT.items() if name not in os.environ})
    try:
        import ray
    except ImportError as error:
        raise WorkerError(
            "Ray is not installed: pip install 'abliterator[ray]'. Several workers on this machine "
            "alone need no Ray: `--workers N`."
        ) from error
    if not ray.is_initialized():
        _silence()
        where = {"include_dashboard": False} if address == AUTO else {"address": address}
        try:
            with _kept_signal_handler():
                ray.init(log_to_driver=False, logging_level="ERROR", **where)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise WorkerError(
                f"No Ray cluster can be joined at {address!r}: {' '.join(str(error).split())[:300]}"
                " Start one with `ray start --head`, give the address that it prints, or `--ray "
                "auto`."
            ) from error
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def gpus_of(nodes: Sequence[Mapping[str, float]]) -> int:
    """How many GPUs the nodes have."""
    return sum(int(node.get("GPU", 0)) for node in nodes)


def hardware_of(nodes: Sequence[Mapping[str, float]]) -> str:
    """Names of the GPUs of the nodes, or the number of their CPUs."""
    kinds = {k.removeprefix(_KIND_OF_GPU) for n in nodes for k in n if k.startswith(_KIND_OF_GPU)}
    if gpus := gpus_of(nodes):
        return f"{gpus} x {' or '.join(sorted(kinds)) or 'GPU'}, by Ray"
    return f"{sum(int(node.get('CPU', 0)) for node in nodes)} CPUs, by Ray"


def share_of(nodes: Sequence[Mapping[str, float]], *, workers: int | None, on_cpu: bool) -> Share:
    """What each worker gets: a GPU, or an equal share of the CPUs.

    Args:
        nodes: their resources.
        workers: how many; None is one a GPU, and on CPUs one a node.
        on_cpu: whether GPUs are left alone.

    Raises:
        WorkerError: if the cluster has no room for so many.
    """
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if not on_cpu and (gpus := gpus_of(nodes)):
        wanted = workers or gpus
        _require_room(wanted, gpus, "GPUs", hint="--device cpu` leaves GPUs alone; `")
        on_nodes = [(int(n.get("GPU", 0)), c) for n, c in zip(nodes, cpus, strict=True)]
        return Share(wanted, 1, max(1, min(c // g for g, c in on_nodes if g)))
    wanted = workers or max(1, sum(map(bool, cpus)))
    _require_room(wanted, sum(cpus), "CPUs")
    threads = next(t for t in range(max(cpus), 0, -1) if sum(cpu // t for cpu in cpus) >= wanted)
    return Share(wanted, 0, threads)


def _require_room(wanted: int, there: int, what: str, *, hint: str = "") -> None:
    if wanted > there:
        raise WorkerError(
            f"The Ray cluster has {there} {what}, and {wanted} workers need one each. Use fewer "
            f"(`{hint}--workers {max(1, there)}`), or add nodes with `ray start --address`."
        )


def ray_workers(share: Share, *, device: str) -> list[Worker]:
    """Starts the actors, and waits until each of them runs.

    Raises:
        WorkerError: if the cluster has no room for them within `START` seconds.
    """
    import ray

    actor = ray.remote(_Actor).options(
        num_cpus=share.threads if not share.gpus else min(1, share.threads),
        num_gpus=share.gpus,
        max_restarts=-1,
        scheduling_strategy="SPREAD",
    )
    workers = [RayWorker(actor.remote(device, share.threads), i) for i in range(share.workers)]
    pings = [worker.ping for worker in workers]
    ready, _ = ray.wait(pings, num_returns=len(pings), timeout=START)
    if len(ready) < len(pings):
        for worker in workers:
            worker.close()
        free = ray.available_resources()
        raise WorkerError(
            f"The Ray cluster had room for {len(ready)} of {len(pings)} workers within {START:g} "
            f"s; {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free. Wait until "
            "others have ended, or use fewer `--workers`."
        )
    return list(workers)


class RayWorker:
    """An actor of a Ray cluster; Ray starts it again where it finds room when it died."""

    def __init__(self, actor: Any, number: int) -> None:
        self.name = f"worker {number} of the Ray cluster"
        self._actor = actor
        self._sent: tuple[int, Any] | None = None  # number of the job, and a reference to it
        self._is_closed = False
        self.ping: Any = self._ping()

    def _ping(self) -> Any:
        # Ray repeats it until the actor has been started again
        return self._actor.place.options(max_task_retries=-1).remote()

    def wait_ready(self, is_over: Callable[[], bool]) -> bool:
        """Waits until the actor answers."""
        import ray

        while not self._is_closed:
            ready, _ = ray.wait([self.ping], timeout=_POLL)
            if ready:
                try:
                    self.name = f"worker on {ray.get(ready[0])}"
                except ray.exceptions.RayError:
                    self.ping = self._ping()
                    return False
                return True
            if is_over():
                return False
        return False

    def run(self, job: NumberedJob, item: Any) -> Outcome:
        """Runs one item in the actor."""
        import ray

        if self._sent is None or self._sent[0] != job.number:
            self._sent = job.number, ray.put(job.job)
        try:
            # within a list, so that only an actor without the job fetches it
            outcome = ray.get(self._actor.run.remote(job.number, [self._sent[1]], item))
        except ray.exceptions.RayTaskError:
            raise  # a bug: what jobs raise is an outcome
        except ray.exceptions.RayError as error:  # the actor died, or its node with the result
            self.ping = self._ping()
            raise WorkerLost(" ".join(str(error).split())[:300]) from error
        return Outcome(*outcome)

    def close(self) -> None:
        """Kills the actor."""
        import ray

        self._is_closed = True
        if ray.is_initialized():
            ray.kill(self._actor)


class _Actor:
    """The resident of one worker; an actor of Ray."""

    def __init__(self, device: str, threads: int) -> None:
        divide_threads(threads)
        self._runner = JobRunner(Resident(choose_device(device), threads))

    def place(self) -> str:
        """The address of its node."""
        import ray

        return str(ray.util.get_node_ip_address())

    def run(self, number: int, box: list[Any], item: Any) -> tuple[Any, ...]:
        """The outcome of an item of the job in `box`."""
        import ray

        job: Job | None = None if self._runner.has(number) else ray.get(box[0])
        return tuple(self._runner.run(number, job, item))


@contextmanager
def _kept_signal_handler() -> Iterator[None]:
    """Keeps this process's handler of SIGTERM, for which Ray sets one of its own."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _silence() -> None:
    """Ray prints deaths of workers and nodes on stdout, where results go; no setting stops it."""
    from ray._private import worker

    worker.print_to_stdstream = lambda *_, **__: None
