"""Choosing and naming devices, their memory, and how its shortage shows."""

import os
from types import SimpleNamespace

import pytest
import torch

from abliterator.benchmarks import require_engine
from abliterator.devices import (
    available_devices,
    choose_device,
    device_memory,
    device_name,
    is_out_of_memory,
    release_memory,
    worker_count,
)
from abliterator.errors import BenchmarkError, RecipeError
from abliterator.pipeline import Options, build
from abliterator.recipe import BenchmarkEngine, load_recipe

SHORTAGES = [
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "HIP out of memory. Tried to allocate 16.00 GiB.",
    "HIP error: hipErrorOutOfMemory",
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "MPS backend out of memory (MPS allocated: 18.00 GB, max allowed: 18.13 GB)",
    "Invalid buffer size: 24.00 GB",
    "XPU out of memory. Tried to allocate 4.00 GiB",
    "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "Native API failed. Native API returns: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory",
    "[enforce fail at alloc_cpu.cpp:128] data. DefaultCPUAllocator: not enough memory",
]
OTHERS = [
    "CUDA error: device-side assert triggered",
    "mat1 and mat2 shapes cannot be multiplied",
    "Expected all tensors to be on the same device, but found at least two devices",
]


@pytest.mark.parametrize("message", SHORTAGES)
def test_a_shortage_of_memory_is_known_by_the_words_of_every_backend(message):
    assert is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("message", OTHERS)
def test_other_errors_are_no_shortage(message):
    assert not is_out_of_memory(RuntimeError(message))


def test_shortages_have_types_too_and_their_words_in_other_errors_mean_nothing():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("any words"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_cpu_is_always_there_and_is_last():
    assert available_devices()[-1] == "cpu"
    assert choose_device("cpu") == "cpu"
    assert "threads" in device_name("cpu")
    release_memory()


def test_the_hosts_memory_is_what_the_system_says():
    memory = device_memory("cpu")
    assert memory.total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.free <= memory.total


@pytest.mark.parametrize("name", ["cuda:99", "abacus", "xpu:7", "meta", "cpu:1", ""])
def test_a_device_that_is_not_there_is_an_error_that_lists_those_that_are(name):
    with pytest.raises(RecipeError, match=r"can use .*cpu\. Choose one"):
        choose_device(name)


def test_an_absent_device_ends_a_build_before_anything_is_written(tiny_folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_folder('llama')}\nlayers: [1]\nk: 1\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="cuda:99"):
        build(load_recipe(recipe), tmp_path / "out", options=Options(device="cuda:99"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("device", "fits"), [("cpu", True), ("xpu:0", True), ("fake:0", False)])
def test_lm_eval_is_not_asked_for_a_device_that_it_would_replace(device, fits):
    if fits:
        require_engine(BenchmarkEngine(), device)
        return
    with pytest.raises(BenchmarkError, match=f"does not compute on {device}"):
        require_engine(BenchmarkEngine(), device)


@pytest.mark.parametrize(("free", "workers"), [(80, 3), (40, 2), (39, 1), (0, 1)])
def test_workers_have_a_core_each_and_half_of_the_free_memory(monkeypatch, free, workers):
    monkeypatch.setattr("abliterator.devices.usable_cores", lambda: 3)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    assert worker_count(10) == workers
