"""Which tasks are meant: files, names, groups, presets, their digests and their pins."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from abliterator import pipeline
from abliterator.benchmarks import (
    Aggregate,
    _registry,
    _tasks,
    resolve_tasks,
)
from abliterator.errors import BenchmarkError, PromptError
from abliterator.recipe import load_recipe
from tests.benchmarks.toy import CHOICE, QUESTIONS


def test_a_local_task_is_found_beside_its_recipe_from_any_folder(
    recipe, tasks, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    again = resolve_tasks(["tasks/toy_choice.yaml", "tasks/toy_say.yaml"], folder=recipe)
    assert again == tasks
    assert [(t.name, t.metric, t.version, t.documents) for t in again] == [
        ("toy_choice", "acc", "1.0", 30),
        ("toy_say", "exact_match", "2.0", 30),
    ]


def test_the_digest_follows_the_task_file_and_its_data(recipe, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(recipe, copy)
    task_file, data_file = copy / "tasks/toy_choice.yaml", copy / "tasks/data/questions.jsonl"

    def digest():
        return resolve_tasks(["tasks/toy_choice.yaml"], folder=copy)[0].digest

    digests = [resolve_tasks(["tasks/toy_choice.yaml"], folder=recipe)[0].digest, digest()]
    for file in (data_file, task_file):  # as git writes them on Windows
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    digests.append(digest())
    assert len(set(digests)) == 1  # neither the place nor the line ends matter
    data_file.write_text("".join(data_file.read_text().splitlines(keepends=True)[:-1]))
    digests.append(digest())
    task_file.write_text(task_file.read_text().replace("question :", "query :"))
    digests.append(digest())
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: t\ndoc_to_text: !function code.read\n", "!function.*line 2.*runs? Python code"),
        ("task: t\ndoc_to_text: !!python/name:os.system\n", "not plain data"),
        ("task: [t\n", "not valid YAML"),
        ("- task: t\n", "holds no settings"),
        ("dataset_path: json\n", "has no `task:` name"),
        ("task: t\ninclude: other.yaml\n", "has `include:`"),
        ("group: g\ntask: [a, b]\n", "has `group:`"),
    ],
)
def test_a_task_file_that_is_not_one_plain_task_is_refused(tmp_path, text, message):
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')\n")
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        resolve_tasks(["t.yaml"], folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, r"data file 'none\.jsonl'"),
        ({"dataset_kwargs": {"data_files": ["https://x.test/a.jsonl"]}}, "no file"),
        ({"metric_list": [{"metric": "sari"}]}, "metric 'sari'"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "metric 'acc'"),
        ({"metric_list": [{"metric": "f1", "aggregation": "f1"}]}, r"No metric .*\(f1\).*mean"),
        ({"doc_to_text": "{{nothing}}"}, "cannot load .*UndefinedError.*nothing"),
        ({"doc_to_text": "{{ cycler.__init__.__globals__.os.getpid() }}"}, "SecurityError"),
        ({"test_split": "none"}, "cannot load .*KeyError"),
        ({"no_such_setting": 1}, "cannot load .*TypeError.*no_such_setting"),
        ({"unsafe_code": True}, "runs code that the model wrote"),
    ],
)  # fmt: skip
def test_a_local_task_that_cannot_be_run_or_paired_is_refused(recipe, change, message):
    (recipe / "tasks/bad.yaml").write_text(yaml.safe_dump(CHOICE | change))
    with pytest.raises(BenchmarkError, match=message):
        resolve_tasks(["tasks/bad.yaml"], folder=recipe)


def test_a_missing_task_file_and_a_task_listed_twice_are_refused(recipe):
    with pytest.raises(BenchmarkError, match=r"none\.yaml cannot be read"):
        resolve_tasks(["tasks/none.yaml"], folder=recipe)
    with pytest.raises(BenchmarkError, match="'toy_choice' is listed twice"):
        resolve_tasks(["tasks/toy_choice.yaml"] * 2, folder=recipe)


def test_a_named_task_fails_in_preflight_with_its_dataset_and_what_to_do(tmp_path, offline):
    with pytest.raises(BenchmarkError, match=r"'arc_easy'.*allenai/ai2_arc.*HF_HUB_OFFLINE"):
        resolve_tasks(["arc_easy"], folder=tmp_path)


def test_a_build_stops_at_a_hub_task_before_a_model_is_loaded(tmp_path, offline, monkeypatch):
    demo = Path(__file__).parents[2] / "recipes" / "demo.yaml"
    monkeypatch.setattr("abliterator.model.load_model", lambda *_, **__: pytest.fail("loaded"))
    recipe = load_recipe(demo, overrides=["benchmarks.tasks=[arc_easy]"])
    with pytest.raises(BenchmarkError, match=r"'arc_easy'.*allenai/ai2_arc"):
        pipeline.build(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_quick_index_finds_what_lm_evals_own_does():
    manager = _registry._manager()
    index = _registry._index()
    names = {name for name in manager.all_subtasks if manager.task_index[name].yaml_path}
    missing = {name for name in names if name not in index}
    assert len(missing) < 0.01 * len(names)  # what is missing is found by lm-eval's own index
    # those that differ are written twice in lm-eval, under one name
    other = {n for n in names - missing if index[n][1] != manager.task_index[n].yaml_path}
    assert len(other) < 0.02 * len(names)
    with pytest.raises(BenchmarkError, match=r"no task named 'arc_eazy'; close to it .*arc_easy"):
        _registry.registered_tasks("arc_eazy")
    assert [task.name for task in _registry.registered_tasks("ai2_arc")] == [
        "arc_challenge",
        "arc_easy",
    ]


@pytest.mark.slow
def test_a_group_stands_for_all_its_tasks():
    found = _registry.registered_tasks("mmlu")
    assert len(found) == 57
    assert all(task.path.is_file() for task in found)
    groups = [tuple(score.group for score in task.aggregates) for task in found]
    assert Counter(groups) == {
        ("mmlu", "mmlu_stem"): 19,
        ("mmlu", "mmlu_other"): 13,
        ("mmlu", "mmlu_social_sciences"): 12,
        ("mmlu", "mmlu_humanities"): 13,
    }
    assert {score for task in found for score in task.aggregates if score.group == "mmlu"} == {
        Aggregate(group="mmlu", metric="acc", by_size=True)
    }


TASK_FILES = {
    "outer.yaml": """
group: outer
task: [inner, {task: alone, num_fewshot: 7}, {group: within, task: [small], fewshot_split: dev}]
num_fewshot: 2
""",
    "inner.yaml": """
group: inner
task: [small, {task: other, test_split: dev}]
num_fewshot: 3
output_type: multiple_choice
aggregate_metric_list: {metric: acc_norm, weight_by_size: false, filter_list: first}
""",
    "own_score.yaml": """
group: own_score
task: [small]
aggregate_metric_list: [{metric: acc, aggregation: !function utils.anything}, {metric: f1}]
""",
    "coded.yaml": "group: coded\ntask: [small]\nprocess_docs: !function utils.anything\n",
    **{f"{name}.yaml": f"task: {name}\n" for name in ("small", "other", "alone")},
}


@pytest.fixture
def lm_evals(tmp_path, monkeypatch):
    """Task files in the place of lm-eval's own."""
    for name, text in TASK_FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(_registry, "_folder", lambda: tmp_path)
    _registry._index.cache_clear()
    yield tmp_path
    _registry._index.cache_clear()


def test_groups_change_their_tasks_as_by_lm_eval(lm_evals):
    """lm-eval's own factory is the oracle, but for the tasks that it would load data for."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._factory import TaskFactory

    built = []

    class Factory(TaskFactory):
        def _build_task(self, entry, overrides):
            built.append((entry.name, {k: v for k, v in overrides.items() if k != "task"}))
            return type("Named", (), {"task_name": f"{len(built)}"})()

    index = TaskManager(include_path=str(lm_evals), include_defaults=False).task_index
    Factory().build(index["outer"], registry=index)
    found = _registry.registered_tasks("outer")
    assert [(task.name, task.overrides) for task in found] == built
    assert [task.overrides["num_fewshot"] for task in found] == [2, 2, 7, 2]
    scores = [[score.group for score in task.aggregates] for task in found]
    assert scores == [["inner"], ["inner"], [], []]
    assert found[0].aggregates[0] == Aggregate(
        group="inner", metric="acc_norm", filters=("first",), by_size=False
    )


def test_a_score_of_a_group_that_is_no_mean_is_left_out(lm_evals):
    (task,) = _registry.registered_tasks("own_score")
    assert [score.metric for score in task.aggregates] == ["f1"]


def test_a_group_that_hands_code_to_its_tasks_is_refused(lm_evals):
    with pytest.raises(BenchmarkError, match=r"'coded' is a group .* functions of its own"):
        _registry.registered_tasks("coded")


def test_what_a_group_changes_reaches_the_task_and_its_digest(recipe, monkeypatch):
    path = recipe / "tasks/toy_choice.yaml"
    files = {"data_files": {"test": str(recipe / "tasks/data/questions.jsonl")}}
    aggregate = Aggregate(group="g", metric="acc_norm")

    def named(changes, aggregates):
        task = _registry.RegisteredTask(
            "toy_choice", path, {"dataset_kwargs": files, **changes}, aggregates
        )
        monkeypatch.setattr(_tasks, "registered_tasks", lambda name: [task])
        (found,) = resolve_tasks(["g"], folder=recipe)
        return found

    plain, changed = named({}, ()), named({"num_fewshot": 3}, (aggregate,))
    assert plain.digest != changed.digest
    assert (plain.metric, changed.metric, changed.aggregates) == ("acc", "acc_norm", (aggregate,))
    loaded = _tasks.load(changed.name, changed.spec, where="")
    assert loaded.get_config("num_fewshot") == 3


def test_a_pinned_revision_reaches_the_dataset(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load_dataset(*, path, name=None, **kwargs):
        asked.append((path, kwargs.get("revision")))
        raise ConnectionError("stop here")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub_task = CHOICE | {"dataset_path": "somebody/questions", "dataset_kwargs": {}}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(hub_task))
    pins = {"allenai/winogrande": "a" * 40, "somebody/questions": "b" * 40}
    for name in ("winogrande", "t.yaml"):
        with pytest.raises(BenchmarkError, match="cannot be had"):
            resolve_tasks([name], folder=tmp_path, revisions=pins)
    assert asked == list(pins.items())


def test_a_hub_out_of_reach_is_asked_once_and_the_pin_found_otherwise(monkeypatch, tmp_path):
    import datasets

    hub_task = CHOICE | {"dataset_path": "somebody/questions", "dataset_kwargs": {}}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(hub_task))
    data = datasets.DatasetDict({"test": datasets.Dataset.from_list(QUESTIONS)})
    offline_then = []

    def load_dataset(**kwargs):
        offline_then.append((datasets.config.HF_HUB_OFFLINE, kwargs.get("revision")))
        return data

    def unreachable(dataset, revision):
        raise PromptError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_tasks, "resolve_revision", lambda dataset, revision: "c" * 40)
    (pinned,) = resolve_tasks(["t.yaml"], folder=tmp_path)
    assert (pinned.dataset, pinned.revision) == ("somebody/questions", "c" * 40)
    monkeypatch.setattr(_tasks, "resolve_revision", unreachable)
    (cached,) = resolve_tasks(["t.yaml"], folder=tmp_path)
    assert (cached.dataset, cached.revision) == ("somebody/questions", None)
    assert cached.digest != pinned.digest
    assert offline_then == [(False, "c" * 40), (True, None)]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_the_reported_metric_follows_the_rule():
    from lm_eval.api.metrics import mean, perplexity

    both = {"acc": mean, "acc_norm": mean}
    assert _tasks._primary_metric("hellaswag", both) == "acc_norm"
    assert _tasks._primary_metric("winogrande", both) == "acc"
    assert _tasks._primary_metric("arc_easy", {"acc": mean}) == "acc"
    assert _tasks._primary_metric("lambada", {"perplexity": perplexity, "acc": mean}) == "acc"
    assert _tasks._primary_metric("other", {"word": perplexity, "strict": mean}) == "strict"
    assert _tasks._primary_metric("wikitext", {"word_perplexity": perplexity}) is None


def test_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'lm_eval', 'datasets', 'scipy'}"
    code = f"import sys, abliterator.benchmarks; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_first_use_changes_neither_the_environment_nor_where_others_log():
    code = """
import logging, os, sys
from abliterator.benchmarks._isolation import lm_eval_isolated
before = dict(os.environ)
with lm_eval_isolated():
    import transformers
assert dict(os.environ) == before
for name in ("transformers", "huggingface_hub"):
    assert [handler.stream for handler in logging.getLogger(name).handlers] == [sys.stderr]
"""
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
