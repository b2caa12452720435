"""Patching in threads: the bytes, hashes, order and errors of one thread, and none left behind."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from abliterator.checkpoint import Checkpoint, FileThreads, TensorInfo, patch_file
from abliterator.errors import FileError
from tests.checkpoint.stored import EDITED, invert, patch_all


def patch_in_threads(base: Checkpoint, out: Path, edit, count: int) -> dict:
    with FileThreads(count) as threads:

        def patch(file: str):
            infos = [base.tensors[name] for name in EDITED if base.tensors[name].file == file]
            return patch_file(base.folder / file, out / file, infos, edit, threads=threads)

        files = list(threads.of_files(patch, base.weight_files))
    assert [file.path for file in files] == [out / file for file in base.weight_files]
    return {tensor.name: tensor for file in files for tensor in file.tensors}


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t is not threading.main_thread()]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_bytes_hashes_and_order_are_those_of_one_thread(folder, tmp_path, count):
    base, buffers, seen_in = Checkpoint.open(folder), set(), set()
    first_two, order = threading.Barrier(2), itertools.count()

    def edit(info: TensorInfo, buffer: memoryview) -> None:
        if count > 1 and next(order) < 2:
            first_two.wait(60)  # they are edited at the same time
        buffers.add(id(buffer.obj))
        seen_in.add(threading.get_ident())
        invert(info, buffer)

    before = workers()
    patched = patch_in_threads(base, tmp_path / "threads", edit, count)
    assert list(patched.items()) == list(patch_all(base, tmp_path / "one", EDITED).items())
    for file in base.weight_files:
        assert (tmp_path / "threads" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    assert min(count, 2) <= len(seen_in) <= count
    assert (threading.get_ident() in seen_in) is (count == 1)
    assert count > 1 or len(base.weight_files) > 1 or len(buffers) == 1
    assert workers() == before


@pytest.mark.parametrize("count", [1, 4])
def test_an_error_of_one_tensor_is_raised_as_it_is_and_nothing_stays(sharded, tmp_path, count):
    base, error = Checkpoint.open(sharded), FileError("this one is damaged")

    def edit(info: TensorInfo, _: memoryview) -> None:
        if info.name == "layers.0.mlp":
            raise error

    before = workers()
    with pytest.raises(FileError) as caught:
        patch_in_threads(base, tmp_path / "out", edit, count)
    assert caught.value is error
    assert [path for path in (tmp_path / "out").rglob("*") if "partial" in path.name] == []
    assert not (tmp_path / "out" / base.tensors["layers.0.mlp"].file).exists()
    assert workers() == before


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C reaches all processes of a console there")
def test_ctrl_c_stops_threads_that_are_at_work(sharded, tmp_path, monkeypatch):
    base, before, start = Checkpoint.open(sharded), workers(), time.monotonic()
    checks: list = []
    monkeypatch.setattr(FileThreads, "__enter__", lambda self: (checks.append(self.check), self)[1])

    def edit(_: TensorInfo, buffer: memoryview) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while True:  # an edit that takes hours, panel by panel
            time.sleep(0.01)
            checks[0]()

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            patch_in_threads(base, tmp_path / "out", edit, 3)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - start < 60
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    assert workers() == before
