"""A bake on several cores, or in several processes: bit-equal to a bake on one."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch

from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, bake_file, bake_on_workers, plan_edits
from abliterator.bake._write import bake_workers
from abliterator.checkpoint import Checkpoint
from abliterator.devices import usable_cores
from abliterator.errors import FileError
from abliterator.recipe import Edit
from abliterator.subspace import random_basis
from abliterator.workers import PoolSettings, open_pool
from tests.bake.jobs import DeadlyBakeFile
from tests.helpers.pairs import random_pairs
from tests.helpers.tiny import D_MODEL, save_tiny


def planned(folder, **settings):
    checkpoint = Checkpoint.open(folder)
    return checkpoint, plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit(**settings))


def files_of(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def sharded(tmp_path, tiny_tokenizer):
    return save_tiny(
        "llama", tmp_path / "base", tiny_tokenizer, dtype=torch.bfloat16, shard_size="20KB"
    )


@pytest.fixture(scope="module")
def pool():
    with open_pool(PoolSettings(workers=2, device="cpu")) as pool:
        yield pool


@pytest.mark.parametrize("settings", [{}, {"rounding": "nearest", "norm": "column"}])
def test_any_number_of_workers_gives_the_same_bytes_and_edits(sharded, tmp_path, settings):
    checkpoint, plan = planned(sharded, **settings)
    assert len(checkpoint.weight_files) > 3
    basis, results = random_basis(D_MODEL, 2, seed=1), []
    for workers in (1, 2, 7):
        sizes: list[int] = []
        out = tmp_path / str(workers)
        edits = bake(checkpoint, plan, basis, out, workers=workers, on_bytes=sizes.append)
        assert sizes == [checkpoint.file_bytes[file] for file in checkpoint.weight_files]
        results.append((files_of(out), edits))
    assert results[0] == results[1] == results[2]
    assert [edit.file for edit in results[0][1]] == sorted(edit.file for edit in results[0][1])
    assert torch.get_num_threads() == 1


def test_other_processes_write_single_files(sharded, tmp_path):
    """What a cluster's workers are given, and what they give back."""
    checkpoint, plan = planned(sharded)
    basis = random_basis(D_MODEL, 2, seed=1)
    edits = bake(checkpoint, plan, basis, tmp_path / "whole")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        parts = [
            process.submit(bake_file, checkpoint, plan, basis, tmp_path / "files", file)
            for file in checkpoint.weight_files
        ]
        assert tuple(edit for part in parts for edit in part.result()) == edits
    whole = files_of(tmp_path / "whole")
    assert files_of(tmp_path / "files") == {
        name: data for name, data in whole.items() if name in checkpoint.weight_files
    }


@pytest.mark.parametrize("dies", [False, True])
def test_a_pool_gives_the_same_bytes_and_edits(sharded, tmp_path, pool, monkeypatch, dies):
    checkpoint, plan = planned(sharded)
    basis, made_from = random_basis(D_MODEL, 2, seed=1), {"recipe_digest": "0"}
    # rounding depends on the order of dimensions in memory
    basis = basis.T.contiguous().T
    edits = bake(checkpoint, plan, basis, tmp_path / "here", made_from=made_from)
    if dies:
        monkeypatch.setattr("abliterator.bake._workers.BakeFile", DeadlyBakeFile)
    sizes: list[int] = []
    options = {"made_from": made_from, "on_bytes": sizes.append}
    out = tmp_path / "workers"
    assert bake_on_workers(pool, checkpoint, plan, basis, out, **options) == edits
    assert sizes == [checkpoint.file_bytes[file] for file in checkpoint.weight_files]
    assert files_of(out) == files_of(tmp_path / "here")
    note = tmp_path / "died"
    assert note.exists() == dies
    if dies:
        unfinished = checkpoint.weight_files[1]
        there = note.read_text().splitlines()
        assert unfinished not in there
        assert f".{unfinished}.partial" in there


def test_a_pool_bakes_edits_of_each_module(sharded, tmp_path, pool):
    checkpoint, plan = planned(sharded)
    pairs = random_pairs(plan, checkpoint)
    edits = bake(checkpoint, plan, pairs, tmp_path / "here")
    assert bake_on_workers(pool, checkpoint, plan, pairs, tmp_path / "workers") == edits
    assert {edit.subspace for edit in edits} == {"writer"}
    assert files_of(tmp_path / "workers") == files_of(tmp_path / "here")


def put_infinity(folder, info):
    with (folder / info.file).open("r+b") as stream:
        stream.seek(info.start)
        stream.write(b"\x80\x7f")


def test_a_damaged_number_is_the_same_error_from_a_worker(sharded, tmp_path, pool):
    checkpoint, plan = planned(sharded)
    for info in {edit.info.file: edit.info for edit in plan.edits[-4:]}.values():
        put_infinity(sharded, info)  # in several files, of which the first is named
    basis, messages = random_basis(D_MODEL, 2, seed=1), []
    for bake_files in (bake, partial(bake_on_workers, pool)):
        with pytest.raises(FileError, match="infinite, NaN") as caught:
            bake_files(checkpoint, plan, basis, tmp_path / "o")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_damaged_number_is_the_same_error_from_a_thread(sharded, tmp_path):
    checkpoint, plan = planned(sharded)
    info = plan.edits[-1].info
    put_infinity(sharded, info)
    messages = []
    for workers in (1, 3):
        with pytest.raises(FileError, match="infinite, NaN") as caught:
            bake(
                checkpoint, plan, random_basis(D_MODEL, 2, seed=1), tmp_path / "o", workers=workers
            )
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert not (tmp_path / "o" / info.file).exists()


def test_as_many_workers_as_their_tensors_fit_in_memory(sharded, monkeypatch):
    checkpoint, plan = planned(sharded)
    assert bake_workers(checkpoint, plan) == 1  # threads would take longer to start
    monkeypatch.setattr("abliterator.bake._write._SMALL_BYTES", 0)
    each = []
    monkeypatch.setattr("abliterator.bake._write.worker_count", lambda n: each.append(n) or 5)
    assert bake_workers(checkpoint, plan) == 5
    assert each[0] > plan.largest_bytes(checkpoint) > 0
    # of a process with one core, beside others
    assert bake_workers(checkpoint, plan, 1) == 2
    assert each[1] == usable_cores() * each[0]
