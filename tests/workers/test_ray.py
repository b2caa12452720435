"""Workers on a Ray cluster of three nodes on this machine, one of which is killed."""

from __future__ import annotations

import os
import threading
from collections import Counter

import pytest
import torch

from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, bake_on_workers, plan_edits
from abliterator.capture import capture
from abliterator.checkpoint import Checkpoint
from abliterator.engines import AnswerPath, DistributedEngine, ModelFolder, TransformersEngine
from abliterator.errors import WorkerError
from abliterator.model import load_model, render_chat
from abliterator.recipe import Edit
from abliterator.source import resolve_folder
from abliterator.subspace import random_basis
from abliterator.workers import PoolSettings, open_pool
from tests.bake.jobs import DeadlyBakeFile
from tests.workers.jobs import Square

ray = pytest.importorskip("ray")

pytestmark = [
    pytest.mark.slow,
    # Ray leaves files of its own processes open
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

MEMORY = {"object_store_memory": 100 << 20}


class Nodes:
    """A cluster: a head without CPUs, and nodes of one CPU each."""

    def __init__(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, **MEMORY}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.cluster.add_node(num_cpus=1, **MEMORY) for _ in range(3)]

    @property
    def address(self) -> str:
        return self.cluster.address

    def kill(self) -> None:
        """Kills a node and all that runs on it."""
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def make_whole(self) -> None:
        while len(self.nodes) < 3:
            self.nodes.append(self.cluster.add_node(num_cpus=1, **MEMORY))


@pytest.fixture(scope="module")
def all_nodes():
    nodes = Nodes()
    yield nodes
    ray.shutdown()
    nodes.cluster.shutdown()


@pytest.fixture
def nodes(all_nodes):
    all_nodes.make_whole()
    return all_nodes


@pytest.fixture
def pool(nodes):
    with open_pool(PoolSettings(ray=nodes.address, workers=3, device="cpu")) as pool:
        yield pool


def count_starts(pool) -> Counter:
    """Counts how often each item of each job is given to a worker."""
    starts: Counter = Counter()

    def counting(run):
        def counted(job, item):
            starts[job.number, str(item)] += 1
            return run(job, item)

        return counted

    for worker in pool.workers:
        worker.run = counting(worker.run)
    return starts


def test_a_node_is_killed_and_only_its_item_runs_again(nodes, pool, tmp_path):
    starts, job = count_starts(pool), Square(tmp_path, delay=0.5)
    killer = threading.Timer(3, nodes.kill)
    killer.start()
    assert job.run(pool, list(range(40))) == [i * i for i in range(40)]
    killer.join()
    assert sorted(starts.values())[-2:] == [1, 2]
    assert sum(job.starts().values()) <= 41


def test_capture_answers_and_distributions_while_a_node_dies(nodes, pool):
    folder = resolve_folder("embedded:demo", revision=None).folder
    local = TransformersEngine(load_model(folder, device="cpu", dtype="float32"))
    distributed = DistributedEngine(pool, ModelFolder.of(folder, "float32"))
    assert distributed.limits == local.limits  # every worker has loaded it
    words = ["planet", "star", "moon", "river", "bread", "garden"]
    prompts = [
        render_chat(local.tokenizer, f"Tell me of {' '.join(words[: i % 6])}, {i}.")
        for i in range(60)
    ]

    def moments(engine, on_batch=None):
        return capture(engine, prompts, max_batch_tokens=64, on_batch=on_batch)

    def answers(engine, on_batch=None):
        return engine.answers(prompts, max_new_tokens=16, batch_size=2, on_batch=on_batch)

    paths = [AnswerPath(tuple(prompt), 4) for prompt in prompts]

    def logits(engine, on_batch=None):
        return list(engine.logits(paths, max_batch_tokens=64, on_batch=on_batch))

    for measure in (moments, answers, logits):
        expected = measure(local)
        nodes.make_whole()
        starts, done = count_starts(pool), []

        def kill_once(n, done=done):
            done.append(n)
            if len(done) == 3:
                nodes.kill()

        got = measure(distributed, kill_once)
        if measure is moments:
            assert torch.equal(got.mean, expected.mean)
            assert torch.equal(got.m2, expected.m2)
        elif measure is answers:
            assert got == expected
        else:
            assert [i for i, _ in got] == [i for i, _ in expected]
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(got, expected, strict=True))
        assert len(done) > 10
        repeated = [item for item, n in starts.items() if n > 1]
        assert len(repeated) <= 1  # what the dead node held
        assert max(starts.values()) <= 2


def test_a_bake_whose_worker_dies_in_the_middle_of_a_file(pool, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr("abliterator.bake._workers.BakeFile", DeadlyBakeFile)
    checkpoint = Checkpoint.open(tiny_folder("llama", shard_size="20KB"))
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit())
    basis, starts = random_basis(plan.d_model, 2, seed=1), count_starts(pool)
    edits = bake(checkpoint, plan, basis, tmp_path / "here")
    assert bake_on_workers(pool, checkpoint, plan, basis, tmp_path / "workers") == edits
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("here", "workers")
    ]
    assert files[0] == files[1]
    assert sorted(starts.values()) == [1] * (len(checkpoint.weight_files) - 1) + [2]


def test_no_worker_left(nodes, tmp_path):
    with open_pool(PoolSettings(ray=nodes.address, workers=1, device="cpu")) as pool:
        pool.patience = 3
        killer = threading.Timer(1, lambda: [nodes.kill() for _ in range(3)])
        killer.start()
        with pytest.raises(WorkerError, match="No worker is left"):
            Square(tmp_path, delay=5).run(pool, [1, 2])
        killer.join()


def test_a_cluster_without_room(nodes):
    settings = PoolSettings(ray=nodes.address, workers=9, device="cpu")
    with pytest.raises(WorkerError, match=r"has 3 CPUs, and 9 workers.*--workers 3"):
        settings.require_room()
    with pytest.raises(WorkerError, match="No node of the Ray cluster has a GPU"):
        _ = PoolSettings(ray=nodes.address, device="cuda").compute_device
