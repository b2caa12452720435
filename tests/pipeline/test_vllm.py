"""Builds whose answers come from vLLM; a small server stands in, with answers of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner

from abliterator.cli import main
from abliterator.errors import GenerationError, ServerError
from abliterator.pipeline._resume import prepare
from abliterator.pipeline._vllm import vllm_engine
from tests.helpers.vllm_interpreter import VERSION, vllm_interpreter
from tests.pipeline.builds import FAST, build, write_project

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="vLLM needs POSIX")

VLLM = ("engine.kind=vllm", "engine.arguments=[--stand-in-toy]")


@pytest.fixture
def project(tmp_path, tiny_folder):
    return write_project(tmp_path, tiny_folder)


@pytest.fixture
def options(tmp_path):
    return replace(FAST, vllm_python=vllm_interpreter(tmp_path / "vllm"))


def test_both_sides_are_answered_each_from_its_own_folder(project, tmp_path, options):
    out = tmp_path / "out"
    record, ran = build(project(*VLLM), out, options)
    assert "rollouts" in ran
    engines = {side: engine.model_dump() for side, engine in record.engines.items()}
    for side in ("base", "edited"):
        assert engines[side] == {
            "kind": "vllm",
            "software": "vllm",
            "version": VERSION,
            "dtype": "float32",
            "model": side,
            "base_url": None,
            "requests": "token ids",
        }
    log = (out / "work" / "vllm.log").read_text()
    served = [line.split(" ")[1] for line in log.splitlines() if line.startswith("serves")]
    assert served == [str(out / "checkpoint"), str(tmp_path / "base")]
    assert not (out / "work" / "vllm").exists()
    # another port and key, and nothing is asked again
    assert build(project(*VLLM), out, options)[1] == []
    (out / "work" / "stages" / "rollouts.json").unlink()
    again, ran = build(project(*VLLM), out, options)
    assert "rollouts" in ran
    assert again.behaviour == record.behaviour


def test_what_does_not_start_stops_the_build_and_the_next_run_goes_on(project, tmp_path, options):
    out = tmp_path / "out"
    failing = (*VLLM[:1], "engine.arguments=[--stand-in-error, 'ValueError: no room']")
    with pytest.raises(ServerError, match="ValueError: no room"):
        build(project(*failing), out, options)
    _, ran = build(project(*VLLM), out, replace(options, force=True))
    assert "bake" not in ran


@pytest.mark.parametrize(("memory", "bakes"), [(None, False), (1 << 14, True)])
def test_candidates_are_baked_where_weights_would_lie_on_disk(
    project, tmp_path, options, memory, bakes
):
    placed = replace(options, device="auto", max_memory=memory)
    run = prepare(project(*VLLM), tmp_path / "out", placed)
    served = vllm_engine(run, run.plan.source.folder, "base", candidates=True).served
    assert served.served.is_beside
    assert served.bakes_edits() is bakes


def test_without_vllm_nothing_begins(project, tmp_path):
    with pytest.raises(GenerationError, match="--vllm-python"):
        build(project(*VLLM), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_plan_says_which_interpreter(project, tmp_path, options):
    arguments = ["plan", str(tmp_path / "r.yaml"), "--json", "--set", VLLM[0]]
    result = CliRunner().invoke(main, [*arguments, "--vllm-python", options.vllm_python])
    notes = json.loads(result.stdout)["notes"]
    assert notes[-1] == (
        f"Answers come from vLLM {VERSION} (a build for accelerators), run by "
        f"{options.vllm_python}."
    )
    refused = CliRunner().invoke(main, [*arguments, "--vllm-python", str(tmp_path / "nothing")])
    assert refused.exit_code == 1
    assert "no program" in refused.stderr
