"""Pools of resident workers: processes that keep a model between the parts of a work.

A `Job` is what every worker prepares once (it loads a model, say), and runs one item of at a time.
Items go to whichever worker is free; results come in the order of the items, so that sums over them
are the same with any number of workers. A worker that dies is started again, and its item goes to
the next free one.

    with open_pool(PoolSettings(workers=2, device="cpu")) as pool:
        for result in pool.map(job, items):
            ...

Workers are processes of this machine (`workers`), or actors of a Ray cluster (`ray`).
"""

from abliterator.workers._pool import Pool
from abliterator.workers._settings import PoolSettings, open_pool
from abliterator.workers._tensors import PackedTensor, pack_tensor, unpack_tensor
from abliterator.workers._types import Job, Resident, Worker, WorkerLost

__all__ = [
    "Job",
    "PackedTensor",
    "Pool",
    "PoolSettings",
    "Resident",
    "Worker",
    "WorkerLost",
    "open_pool",
    "pack_tensor",
    "unpack_tensor",
]
