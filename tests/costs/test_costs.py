"""Costs of passes and stages: sizes from headers, rates of a machine, and what follows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterator import costs
from abliterator.anatomy import anatomy_of
from abliterator.checkpoint import Checkpoint
from abliterator.costs import ACCELERATORS, Answers, Benchmark, Costs, Matrix, ModelShape, Work
from tests.helpers.architectures import save

H100 = costs.assumed(ACCELERATORS["h100"])
# Llama 3.1 8B by its config
EIGHT_B = ModelShape(
    matrices=(
        Matrix(4096, 4096, 64),
        Matrix(4096, 1024, 64),
        Matrix(4096, 14336, 64),
        Matrix(14336, 4096, 32),
    ),
    n_layers=32,
    d_model=4096,
    vocabulary=128256,
    key_width=1024,
    experts=0,
    active=0,
    parameters=8_030_261_248,
    stored=16_060_522_496,
)


def shape(name: str, folder: Path, **options) -> ModelShape:
    checkpoint = Checkpoint.open(save(name, folder / "m", **options))
    return costs.shape_of(checkpoint, anatomy_of(checkpoint.config))


def test_the_shape_of_a_dense_model_counts_every_matrix_of_its_blocks(tmp_path):
    checkpoint = Checkpoint.open(save("llama", tmp_path / "m"))
    found = costs.shape_of(checkpoint, anatomy_of(checkpoint.config))
    blocks = [t.shape for n, t in checkpoint.tensors.items() if ".layers." in n]
    assert found.active_parameters == sum(math.prod(s) for s in blocks if len(s) == 2)
    everything = sum(math.prod(t.shape) for t in checkpoint.tensors.values())
    assert found.parameters == everything
    assert (found.experts, found.n_layers, found.d_model) == (0, 3, 32)
    assert found.key_width == checkpoint.tensors["model.layers.0.self_attn.k_proj.weight"].shape[0]


def test_of_experts_those_count_that_a_token_is_sent_to_in_either_form_on_disk(tmp_path):
    apart = shape("mixtral-square", tmp_path / "a")
    fused = shape("mixtral-square", tmp_path / "b", save_original_format=False)
    assert (apart.experts, apart.active) == (4, 2)
    experts = sum(m.inner * m.outer * m.count for m in apart.matrices if m.expert)
    others = sum(m.inner * m.outer * m.count for m in apart.matrices if not m.expert)
    assert experts
    assert apart.active_parameters == others + experts / 2
    assert fused.active_parameters == apart.active_parameters


def test_a_product_takes_what_was_measured_and_lies_between_its_neighbours():
    for timing in H100.products:
        seconds = H100.product_seconds(timing.rows, timing.width, timing.width)
        assert seconds == pytest.approx(timing.seconds)
    few, between, many = (H100.product_seconds(rows, 1024, 1024) for rows in (64, 100, 256))
    assert few <= between <= many
    assert H100.product_seconds(0, 1024, 1024) == 0


@given(rows=st.integers(1, 10**6), inner=st.integers(1, 10**5), outer=st.integers(1, 10**5))
def test_a_product_of_any_size_takes_some_time(rows, inner, outer):
    assert 0 < H100.product_seconds(rows, inner, outer) < math.inf


def test_a_large_batch_takes_two_flops_a_parameter_and_one_row_a_reading_of_the_weights():
    work, peak = Work(EIGHT_B, H100), ACCELERATORS["h100"]
    n = 4096
    flops = 2 * EIGHT_B.active_parameters * n
    assert work.forward(1, n) == pytest.approx(flops / (0.5 * peak.flops), rel=0.25)
    one = Work(EIGHT_B, H100.model_copy(update={"block_overhead": 0.0, "pass_overhead": 0.0}))
    read = 2 * EIGHT_B.active_parameters / (0.65 * peak.bandwidth)
    assert one.forward(1, 1) == pytest.approx(read, rel=0.05)


def test_experts_that_no_token_reaches_are_not_read(tmp_path):
    moe = ModelShape(
        matrices=(Matrix(4096, 1024, 128 * 8, expert=True),),
        n_layers=8,
        d_model=4096,
        vocabulary=1000,
        key_width=128,
        experts=128,
        active=2,
        parameters=1,
        stored=1,
    )
    rates = H100.model_copy(update={"block_overhead": 0.0, "pass_overhead": 0.0, "stream": 0.0})
    work = Work(moe, rates)
    assert work.forward(1, 1) == pytest.approx(2 / 128 * work.forward(1, 4096), rel=0.5)


def test_longer_and_more_answers_take_longer_and_batches_less_than_single_ones():
    work = Work(EIGHT_B, H100)
    short, long = work.answers(16, 40, 32, 16), work.answers(16, 40, 256, 16)
    assert 6 < long / short < 9
    assert long < work.answers(16, 40, 256, 1) / 8
    assert work.answers(32, 40, 256, 16) == pytest.approx(2 * long)
    shared = work.answers(512, 2000, 2, 16, shared=1900)
    assert shared < work.answers(512, 2000, 2, 16) / 4


def test_stages_say_what_they_read_generate_and_hold():
    stages = Costs(Work(EIGHT_B, H100))
    answers = Answers([40] * 100, 256, 64)
    rollouts = stages.rollouts([answers])
    assert (rollouts.read_tokens, rollouts.answer_tokens) == (8000, 51200)
    cache = 64 * 296 * 2 * 1024 * 32 * 2
    assert 16.06e9 + cache < rollouts.device_memory < 22e9
    assert rollouts.host_memory < 10e9
    divergence = stages.divergence(Answers([40] * 128, 32, 64), 4096)
    assert divergence.disk == 128 * 32 * 128256 * 2
    benchmarks = stages.benchmarks([Benchmark(500, 4, 40), Benchmark(10, 1, 60, 128)], 8)
    assert benchmarks.read_tokens == 2 * (500 * 4 * 40 + 600)
    assert benchmarks.answer_tokens == 2 * 1280
    assert stages.benchmarks([], 8).seconds == 0


def test_lengths_that_are_not_known_spread_about_their_mean():
    lengths = costs.spread(40, 100)
    assert len(lengths) == 100
    assert sum(lengths) / 100 == pytest.approx(40, abs=1)
    assert (min(lengths), max(lengths)) == (30, 49)
    assert costs.spread(16, 1) == [12]


def test_this_machine_is_measured_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("ABLITERATOR_CACHE", str(tmp_path))
    assert costs.known_machine("cpu", "float32") is None
    machine = costs.calibrate("cpu", "float32", folder=tmp_path)
    rates = machine.model_dump(include={"bandwidth", "fresh", "disk_read", "disk_write", "hashing"})
    assert all(10**6 < rate < 10**13 for rate in rates.values())
    assert all(t.seconds > 0 for t in machine.products)
    assert machine.base_memory > 50 << 20
    costs.remember(machine)
    assert costs.known_machine("cpu", "float32") == machine
    assert costs.known_machine("cpu", "bfloat16") is None
    (file,) = (tmp_path / "machines").iterdir()
    file.write_text("{")
    assert costs.known_machine("cpu", "float32") is None
