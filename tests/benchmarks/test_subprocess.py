"""Sides in processes of their own: resumed, short of memory, killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from abliterator.benchmarks import (
    ScoredCheckpoint,
    _scores,
    _subprocess,
    measure_sides,
    resolve_tasks,
)
from abliterator.errors import BenchmarkError
from abliterator.processes import python_command
from abliterator.recipe import BenchmarkTask
from tests.benchmarks.toy import run, run_settings, save_model, scored
from tests.helpers.windows_rules import windows_rules


def test_gold_likelihoods_and_empty_or_cut_answers_are_kept(says_no, scores, tasks):
    choice, say = (run(says_no, tasks, batch_size=7)[name] for name in ("toy_choice", "toy_say"))
    # "no" is near certain: a question whose answer is "yes" has a gold answer that is not
    assert all((s.gold_loglik > -1) == bool(s.value) for s in choice.scores)
    assert {(s.empty, s.truncated) for s in choice.scores} == {(None, None)}
    assert {(s.empty, s.truncated, s.gold_loglik) for s in say.scores} == {(False, True, None)}


def test_sides_scored_apart_are_what_they_are_in_one_process_and_are_resumed(
    plain, says_no, tasks, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sides = {"base": ScoredCheckpoint(plain, "1"), "edited": ScoredCheckpoint(says_no, "2")}
    seen = []
    arguments = (sides, tasks, run_settings(batch_size=7, limit=5))

    def measured(arguments=arguments):
        return measure_sides(
            *arguments, out=tmp_path / "out", on_task=lambda side, task: seen.append((side, task))
        )

    first = measured()
    assert first["base"] == run(plain, tasks, batch_size=7, limit=5)
    assert first["edited"] == run(says_no, tasks, batch_size=7, limit=5)
    assert seen == [(side, task.name) for side in sides for task in tasks]

    asked = []
    child = _subprocess._run_child

    def counted(job, **options):
        asked.append((Path(job["folder"]), [task["name"] for task in job["tasks"]]))
        child(job, **options)

    monkeypatch.setattr(_subprocess, "_run_child", counted)
    assert measured() == first
    assert asked == []
    (tmp_path / "out/edited/toy_say.json").unlink()  # as if it had been killed there
    assert measured() == first
    assert asked == [(says_no, ["toy_say"])]


def test_too_little_memory_halves_the_batch_of_both_sides(monkeypatch, plain, tasks, tmp_path):
    asked = []

    def child(job, *, log, on_task):
        batch = job["settings"]["section"]["batch_size"]
        asked.append((Path(job["folder"]).name, batch))
        if job["folder"] == "edited" and batch > 4:
            raise _subprocess.OutOfMemory
        for task in job["tasks"]:
            found = scored([1.0], task=task["name"]).model_dump(mode="json")
            path = Path(job["out"]) / f"{task['name']}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_scores._sealed(job["keys"][task["name"]], found)))

    monkeypatch.setattr(_subprocess, "_run_child", child)
    sides = {side: ScoredCheckpoint(Path(side), side) for side in ("base", "edited")}
    measure_sides(sides, tasks, run_settings(batch_size=16), out=tmp_path)
    assert asked == [(side, batch) for batch in (16, 8, 4) for side in ("base", "edited")]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), _subprocess.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), _subprocess.OUT_OF_MEMORY),
        (BenchmarkError("no template"), _subprocess.NAMED_ERROR),
    ],
)
def test_a_child_says_how_it_ended(monkeypatch, tmp_path, error, code):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(_subprocess, "run_tasks", fail)
    settings = run_settings().model_dump(mode="json")
    job = {"folder": "f", "tasks": [], "settings": settings, "keys": {}, "out": "o"}
    job["side"] = "base"
    (tmp_path / "job.json").write_text(json.dumps(job))
    with (tmp_path / "stdout").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert _subprocess.main(tmp_path / "job.json") == code
    if code == _subprocess.NAMED_ERROR:
        assert (tmp_path / "stdout").read_text() == 'error "no template"\n'


def test_what_was_scored_before_a_kill_is_not_scored_again(plain, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sides = {"base": ScoredCheckpoint(plain, "1")}
    settings = run_settings(batch_size=7, limit=5)

    def stop(side, task):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # the child is killed with it
        measure_sides(sides, tasks, settings, out=tmp_path / "out", on_task=stop)
    first = (tmp_path / "out/base/toy_choice.json").stat().st_mtime_ns
    found = measure_sides(sides, tasks, settings, out=tmp_path / "out")
    assert (tmp_path / "out/base/toy_choice.json").stat().st_mtime_ns == first
    assert found["base"] == run(plain, tasks, batch_size=7, limit=5)


def test_torchs_own_out_of_memory_reaches_the_parent_through_lm_eval(
    plain, tasks, tmp_path, monkeypatch
):
    import torch
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def hungry(self, input_ids=None, **kwargs):
        if len(input_ids) > 4:
            torch.empty(2**50)  # 4 PiB: the allocator's own exception
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", hungry)
    asked = []

    def child(job, *, log, on_task):
        job_file = tmp_path / "job.json"
        job_file.write_text(json.dumps(job))
        asked.append(job["settings"]["section"]["batch_size"])
        with (tmp_path / "stdout").open("w") as stdout, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            code = _subprocess.main(job_file)
        if code == _subprocess.OUT_OF_MEMORY:
            raise _subprocess.OutOfMemory
        assert code == 0

    monkeypatch.setattr(_subprocess, "_run_child", child)
    sides = {side: ScoredCheckpoint(plain, side) for side in ("base", "edited")}
    settings = run_settings(batch_size=16, limit=10)
    found = measure_sides(sides, tasks[:1], settings, out=tmp_path / "out")
    assert asked == [16, 8, 4, 4]
    assert {side: found[side]["toy_choice"].settings["batch_size"] for side in sides} == {
        "base": 4, "edited": 4
    }  # fmt: skip


def test_errors_of_a_child_reach_the_user(tasks, tmp_path):
    bare = save_model(tmp_path / "bare", chat_template=False)
    sides = {"base": ScoredCheckpoint(bare, "1")}
    with windows_rules(tmp_path), pytest.raises(BenchmarkError, match="has none"):
        measure_sides(sides, tasks[:1], run_settings(chat_template=True), out=tmp_path / "out")


def test_a_side_ends_with_its_parent(tmp_path):
    """At once, though its job never comes."""
    job = tmp_path / "job.json"
    os.mkfifo(job)
    command = python_command("-m", "abliterator.benchmarks", str(job))
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_task_can_have_settings_of_its_own(plain, recipe):
    request = BenchmarkTask(
        task="tasks/toy_choice.yaml", limit=3, num_fewshot=1, chat_template=True
    )
    (task,) = resolve_tasks([request], folder=recipe)
    found = run(plain, [task], batch_size=7, limit=9)["toy_choice"]
    assert (found.n, found.settings["chat_template"], found.settings["num_fewshot"]) == (3, True, 1)


def test_benchmark_scores_that_were_changed_are_not_kept(tmp_path):
    """They are kept one by one, before their stage is done."""
    scores = {
        "task": "facts",
        "metric": "acc",
        "n": 1,
        "higher_is_better": True,
        "scores": [],
        "settings": {},
    }
    kept = _scores._sealed("key", scores)
    (tmp_path / "facts.json").write_text(json.dumps(kept))
    assert _scores.kept_scores(tmp_path, "facts", "key").n == 1
    assert _scores.kept_scores(tmp_path, "facts", "other") is None
    for damage in ({"scores": {**scores, "n": 2}}, {"sha256": "0"}, {"key": "other"}):
        (tmp_path / "facts.json").write_text(json.dumps({**kept, **damage}))
        assert _scores.kept_scores(tmp_path, "facts", "key") is None
    for text in ("", "[]", "{}", '{"key": "key"}', "\x00"):
        (tmp_path / "facts.json").write_text(text)
        assert _scores.kept_scores(tmp_path, "facts", "key") is None


def test_scores_of_any_task_name_are_kept_where_windows_allows(tmp_path, monkeypatch):
    name = "toy: is it 1/2?"

    def run_tasks(*_, on_task, **options):
        on_task(scored([1.0], task=name))

    monkeypatch.setattr(_subprocess, "run_tasks", run_tasks)
    settings = run_settings().model_dump(mode="json")
    job = {"folder": "f", "tasks": [], "settings": settings, "side": "base"}
    job |= {"keys": {name: "key"}, "out": str(tmp_path / "out")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    with windows_rules(tmp_path), (tmp_path / "stdout").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert _subprocess.main(tmp_path / "job.json") == 0
    assert _scores.kept_scores(tmp_path / "out", name, "key") == scored([1.0], task=name)
    assert [path.parent for path in tmp_path.rglob("*%3A*")] == [tmp_path / "out"]
