"""Limits of the recipe stop an upload before anything is sent, and say by how much."""

import json

import pytest

from abliterator.errors import PublishError
from abliterator.publish import Target, plan_publish
from abliterator.recipe import load_recipe
from abliterator.record import BenchmarkResult, Estimate, RunRecord
from abliterator.verification import RECORD
from tests.publish.conftest import build


def figure(value):
    return Estimate(value=value, low=None, high=None, n=10)


def test_a_limit_that_is_not_met_stops_the_plan(tmp_path, tiny_folder):
    limits = "publish.require={kl_at_most: 0, benchmark_loss_at_most: 0.03}"
    base, out = build(tmp_path, tiny_folder, limits)
    with pytest.raises(PublishError) as error:
        plan_publish(base, out / "checkpoint", Target("somebody/tiny"))
    record = json.loads((out / "checkpoint" / RECORD).read_text())
    kl = record["divergence"]["kl_first_token"]["value"]
    assert f"kl is {kl:.3f}, {kl:.3f} above `kl_at_most: 0`" in str(error.value)
    assert "`benchmark_loss_at_most` is 0.03, and this was not measured" in str(error.value)


@pytest.fixture
def record(built):
    from abliterator.publish._require import require_measured

    text = (built[1] / "checkpoint" / RECORD).read_text()

    def check(**limits):
        record = RunRecord.model_validate_json(text)
        result = BenchmarkResult(
            metric="acc",
            n=10,
            base=figure(0.6),
            edited=figure(0.5),
            delta=figure(-0.1),
            smallest_detectable=None,
        )
        recipe = record.recipe | {"publish": {"require": limits}}
        updates = {"benchmarks": {"arc": result}, "recipe": recipe}
        require_measured(record.model_copy(update=updates))

    return check


def test_each_benchmark_has_its_loss(record):
    record(benchmark_loss_at_most=0.11, kl_at_most=50)
    record()
    with pytest.raises(PublishError, match=r"of arc is 0\.100, 0\.070 above"):
        record(benchmark_loss_at_most=0.03)


def test_limits_are_no_part_of_the_digest(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: a/b\nlayers: [1]\nk: 1\n")
    plain = load_recipe(path)
    limited = load_recipe(path, overrides=["publish.require={refusal_at_most: 0.1}"])
    assert limited.publish.require.refusal_at_most == 0.1
    assert (limited.digest, "publish" in plain.published()) == (plain.digest, False)
