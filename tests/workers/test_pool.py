"""Workers that are processes of this machine: order, deaths, errors, what they are given."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from abliterator.errors import DirectionError, WorkerError
from abliterator.workers import PoolSettings, open_pool
from tests.workers.jobs import Failing, Seen, Square

ITEMS = list(range(12))
SQUARES = [item * item for item in ITEMS]


@pytest.fixture(scope="module")
def pool():
    with open_pool(PoolSettings(workers=2, device="cpu", secrets=frozenset({"A_KEY"}))) as pool:
        yield pool


def test_results_come_in_order_and_each_item_starts_once(pool, tmp_path):
    job = Square(tmp_path)
    assert job.run(pool, ITEMS) == SQUARES
    assert set(job.starts().values()) == {1}


def test_no_more_than_a_few_results_wait_for_their_turn(pool, tmp_path):
    job = Square(tmp_path)
    results = pool.map(pool.number(job), list(range(100)))
    assert next(results) == 0
    time.sleep(1)
    results.close()
    assert len(job.starts()) < 20


def test_an_item_whose_worker_died_runs_again_and_no_other(pool, tmp_path):
    job = Square(tmp_path, deadly=5, deaths=1)
    assert job.run(pool, ITEMS) == SQUARES
    assert job.starts() == {item: 2 if item == 5 else 1 for item in ITEMS}


def test_an_item_on_which_workers_die_three_times_is_given_up(pool, tmp_path):
    job = Square(tmp_path, deadly=5)
    with pytest.raises(WorkerError, match=r"died 3 times .* number 6 of 12.*exit code 3"):
        job.run(pool, ITEMS)
    assert job.starts()[5] == 3
    again = tmp_path / "again"
    again.mkdir()
    assert Square(again).run(pool, ITEMS) == SQUARES  # the pool can still be used


def test_a_worker_is_killed_from_outside(pool, tmp_path):
    (victim, *_), job = pool.each(Seen("")), Square(tmp_path, delay=0.3)
    results = pool.map(pool.number(job), ITEMS)
    first = next(results)
    os.kill(victim["pid"], signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    assert [first, *results] == SQUARES
    assert sum(job.starts().values()) <= len(ITEMS) + 1


def test_errors_keep_their_kind(pool):
    with pytest.raises(DirectionError, match=r"^Two directions are one\.$"):
        list(pool.map(pool.number(Failing(is_bug=False)), [1]))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError: 'a bug'"):
        list(pool.map(pool.number(Failing(is_bug=True)), [1]))


def test_a_worker_has_its_threads_and_no_secrets_but_those_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "1")
    monkeypatch.setenv("OTHER_KEY", "1")
    settings = PoolSettings(workers=1, device="cpu", secrets=frozenset({"A_KEY"}))
    with open_pool(settings) as pool:
        (seen,) = pool.each(Seen("A_KEY"))
        assert (seen["threads"], seen["variable"], seen["opened"]) == (1, "1", None)
        (seen,) = pool.each(Seen("OTHER_KEY"))
        assert seen["variable"] is None
        Square(tmp_path).run(pool, [1])
        (seen,) = pool.each(Seen(""))
        assert seen["opened"] == 1  # kept from one job to the next
        child = psutil.Process(seen["pid"])
    assert not child.is_running()


SCRIPT = """
from pathlib import Path
from abliterator.workers import PoolSettings, open_pool
from tests.workers.jobs import Square
print("started", flush=True)
pool = open_pool(PoolSettings(workers=1, device="cpu"))
Square(Path({folder!r}), delay=60).run(pool, [1])
"""


def test_workers_of_a_killed_program_end_and_its_script_is_not_run_again(tmp_path):
    script, notes = tmp_path / "script.py", tmp_path / "notes"
    notes.mkdir()
    script.write_text(SCRIPT.format(folder=str(notes)), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True
    ) as program:
        while not any(notes.iterdir()):
            assert program.poll() is None
            time.sleep(0.1)
        (note,) = notes.iterdir()
        child = psutil.Process(int(note.name.rpartition(".")[2]))
        program.kill()
        assert program.communicate()[0] == "started\n"
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running()


@pytest.mark.parametrize("device", ["balanced", "cuda:1"])
def test_devices_that_are_not_one_a_worker(device):
    with pytest.raises(WorkerError, match="one device of its own"):
        PoolSettings(workers=2, device=device)


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerError, match=r"pip install 'abliterator\[ray\]'"):
        _ = PoolSettings(ray="auto").compute_device
