"""Builds whose answers come from a server, against the build in one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from abliterator import pipeline
from abliterator.engines import ServedEngine, TransformersEngine
from abliterator.errors import ServerError
from abliterator.model import load_model, load_tokenizer
from abliterator.pipeline._engines import probe_engines
from abliterator.pipeline._resume import prepare, run_missing
from abliterator.pipeline.stages.benchmarks import benchmark_engine
from abliterator.pipeline.stages.prompts import PROMPTS
from abliterator.recipe import BenchmarkEngine, load_recipe
from tests.helpers.answer_server import AnswerServer, answers_of, echoing
from tests.pipeline.builds import FAST, Log, build, write_project

ANSWERS = ("work/rollouts.jsonl", "work/verdicts.jsonl", "work/divergence_paths.json")


@cache
def engine_in(folder, weights):
    return TransformersEngine(load_model(folder, device="cpu", dtype="float32"))


def model_in(folder):
    """What the checkpoint in a folder answers, whichever lies there when it is asked."""

    def engine():
        return engine_in(folder, (folder / "model.safetensors").read_bytes())

    return answers_of(engine)


@pytest.fixture
def project(tmp_path, tiny_folder):
    recipe = write_project(tmp_path, tiny_folder)
    return lambda server, *more: recipe(
        "engine.kind=server", f"engine.base_url={server.url}", "engine.base=base", *more
    )


@pytest.fixture
def server(tmp_path, project):
    models = {"base": model_in(tmp_path / "base"), "edited": model_in(tmp_path / "out/checkpoint")}
    with AnswerServer(models, load_tokenizer(tmp_path / "base")) as server:
        yield server


def test_a_served_build_has_the_answers_of_one_in_process(tmp_path, tiny_folder, project, server):
    inside, out = tmp_path / "inside", tmp_path / "out"
    expected, _ = build(load_recipe(tmp_path / "r.yaml"), inside)
    record, ran = build(project(server), out)
    for name in ANSWERS:
        assert (out / name).read_bytes() == (inside / name).read_bytes(), name
    assert record.divergence == expected.divergence
    assert record.behaviour == expected.behaviour
    assert expected.engines == {}
    assert not (inside / "work/engines.json").exists()
    assert {side: (e.kind, e.version, e.model) for side, e in record.engines.items()} == {
        "base": ("server", "0.33.0", "base"),
        "edited": ("server", "0.33.0", "edited"),
    }
    card = (out / "checkpoint/README.md").read_text()
    assert (
        "| Answers of `edited` | `server` `vllm` `0.33.0`, type not stated, by `token ids` |"
        in card
    )
    assert "Answers of" not in (inside / "checkpoint/README.md").read_text()
    asked = len(server.bodies)
    assert build(project(server), out)[1] == []
    # another edit: the base's answers are kept, and where they came from
    record, ran = build(project(server, "layers=[1]"), out, options=replace(FAST, force=True))
    assert "rollouts" in ran
    assert set(record.engines) == {"base", "edited"}
    assert {body["model"] for body in server.bodies[asked:]} == {"edited"}


def test_an_edited_model_that_is_not_served_yet_is_named_and_the_same_command_goes_on(
    tmp_path, project, server
):
    edited = server.models.pop("edited")
    out = tmp_path / "out"
    with pytest.raises(ServerError, match=r"serves `base`, not `edited`.*`engine\.edited`"):
        build(project(server), out)
    assert set(server.prompts.values()) == {1}  # probes: nothing was answered that is not used
    server.models["edited"] = edited
    _, ran = build(project(server), out)
    assert ran[0] == "rollouts"
    assert (out / "work/rollouts.jsonl").is_file()


def test_a_wrong_base_is_named_before_anything_is_captured(tmp_path, project, server):
    log = Log()
    with pytest.raises(ServerError, match=r"not `bass`, under which the base model is expected"):
        pipeline.build(
            project(server, "engine.base=bass"), tmp_path / "out", options=FAST, progress=log
        )
    assert log.ran == ["prompts"]
    assert not (tmp_path / "out").exists()
    assert not server.bodies


def test_candidates_of_a_sweep_are_answered_in_this_process(tmp_path, project, server):
    run = prepare(project(server), tmp_path / "out", FAST, Log())
    folder = run.plan.source.folder
    assert isinstance(run.answering(folder), ServedEngine)
    assert isinstance(run.answering(folder, candidates=True), TransformersEngine)
    assert run.answers_depend_on(candidates=True) == []
    assert len(run.answers_depend_on()) == 1


def test_what_runs_benchmarks(tmp_path, project, server):
    served = BenchmarkEngine(
        kind="server",
        base_url=server.url,
        edited_url=server.url,
        base="base",
        edited="edited",
        api_key_env=None,
    )
    assert benchmark_engine(project(server)) == served
    assert benchmark_engine(project(server, "engine.benchmarks=false")) == BenchmarkEngine()
    own = ("benchmarks.engine.options={max_length: 9}", "benchmarks.preset=demo")
    assert benchmark_engine(project(server, *own)).options == {"max_length": 9}


def test_first_tokens_other_than_those_of_the_model_held_here_are_noted(tmp_path, project, server):
    server.models["base"] = echoing
    notes = []
    log = Log()
    log.note = notes.append
    run = prepare(project(server), tmp_path / "out", FAST, log)
    run_missing(run, run.recipe, [PROMPTS], keep_from=None)
    probe_engines(run, {"base": run.plan.source.folder})
    assert not [note for note in notes if "begins with" in note]
    run.loaded(run.plan.source.folder)
    run._served.clear()
    probe_engines(run, {"base": run.plan.source.folder})
    assert [note for note in notes if "The server's answer begins with" in note]
