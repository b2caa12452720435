from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from abliterator import pipeline
from abliterator.benchmarks import (
    PRESETS,
    Aggregate,
    DocScore,
    Engine,
    RunSettings,
    Subject,
    TaskRequest,
    TaskScores,
    _apart,
    _named,
    _tasks,
    compare_tasks,
    measure_sides,
    preset_tasks,
    require_engine,
    resolve_tasks,
    run_tasks,
)
from abliterator.errors import BenchmarkError, PromptError
from abliterator.recipe import load_recipe
from tests.completions_server import CompletionsServer

QUESTIONS = [
    {"question": f"is {a} {b} ?", "choices": ["yes", "no"], "label": int((i + j) % 5 > 2)}
    for i, a in enumerate(["red", "blue", "green", "black", "white"])
    for j, b in enumerate(["warm", "cold", "dark", "light", "plain", "loud"])
]
YES = sum(doc["label"] == 0 for doc in QUESTIONS)  # 18 of 30
CHOICE = {
    "task": "toy_choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/questions.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "question : {{question}} answer :",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "metric_list": [
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
    "metadata": {"version": 1.0},
}
SAY = {
    **{key: CHOICE[key] for key in ("dataset_path", "test_split", "doc_to_text")},
    "dataset_kwargs": {**CHOICE["dataset_kwargs"], "trust_remote_code": False},
    "task": "toy_say",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[label]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 3},
    "filter_list": [
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}]},
        {"name": "raw", "filter": []},
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 2.0},
}
for _filter in SAY["filter_list"]:
    _filter["filter"].append({"function": "take_first"})


def run(folder, tasks, **settings):
    return run_tasks(folder, tasks, RunSettings(**settings))


@pytest.fixture(autouse=True, scope="module")
def _private_dataset_cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe's folder with both tasks in tasks/ and their documents in tasks/data/."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "tasks/data").mkdir(parents=True)
    lines = "".join(json.dumps(doc) + "\n" for doc in QUESTIONS)
    (folder / "tasks/data/questions.jsonl").write_text(lines)
    for task in (CHOICE, SAY):
        (folder / f"tasks/{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def tasks(recipe):
    return resolve_tasks(["tasks/toy_choice.yaml", "tasks/toy_say.yaml"], folder=recipe)


def save_model(folder: Path, change=None, chat_template: bool = True) -> Path:
    """A random two-layer llama (float32, untied), edited by `change`, with a small tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word for doc in QUESTIONS for word in doc["question"].split()}
    vocabulary = [
        "<unk>",
        "<eos>",
        "user",
        "model",
        "question",
        ":",
        "answer",
        "yes",
        "no",
        *sorted(words),
    ]
    backend = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>"
    )
    if chat_template:
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"
            "{% if add_generation_prompt %}model :\n{% endif %}"
        )
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=1.0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if change is not None:
        with torch.no_grad():
            change(model, vocabulary)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def always(word: str):
    """Makes the model say `word` whatever it reads: a constant stream, and one row that fits it."""

    def change(model, vocabulary):
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[vocabulary.index(word)] = 1.0

    return change


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def says_no(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("no"), always("no"))


@pytest.fixture(scope="module")
def says_yes(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("yes"), always("yes"))


@pytest.fixture(scope="module")
def scores(plain, tasks) -> dict[str, TaskScores]:
    return run(plain, tasks, batch_size=7)


# --- finding tasks ---


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
    assert digests[0] == digests[1]  # the place does not matter
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


@pytest.fixture
def offline(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_named_task_fails_in_preflight_with_its_dataset_and_what_to_do(tmp_path, offline):
    with pytest.raises(BenchmarkError, match=r"'arc_easy'.*allenai/ai2_arc.*HF_HUB_OFFLINE"):
        resolve_tasks(["arc_easy"], folder=tmp_path)


def test_a_build_stops_at_a_hub_task_before_a_model_is_loaded(tmp_path, offline, monkeypatch):
    demo = Path(__file__).parents[1] / "recipes" / "demo.yaml"
    monkeypatch.setattr("abliterator.model.load_model", lambda *_, **__: pytest.fail("loaded"))
    recipe = load_recipe(demo, overrides=["benchmarks.tasks=[arc_easy]"])
    with pytest.raises(BenchmarkError, match=r"'arc_easy'.*allenai/ai2_arc"):
        pipeline.build(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_quick_index_finds_what_lm_evals_own_does():
    manager = _named._manager()
    index = _named._index()
    names = {name for name in manager.all_subtasks if manager.task_index[name].yaml_path}
    missing = {name for name in names if name not in index}
    assert len(missing) < 0.01 * len(names)  # what is missing is found by lm-eval's own index
    # those that differ are written twice in lm-eval, under one name
    other = {n for n in names - missing if index[n][1] != manager.task_index[n].yaml_path}
    assert len(other) < 0.02 * len(names)
    with pytest.raises(BenchmarkError, match=r"no task named 'arc_eazy'; close to it .*arc_easy"):
        _named.named_tasks("arc_eazy")
    assert [task.name for task in _named.named_tasks("ai2_arc")] == ["arc_challenge", "arc_easy"]


@pytest.mark.slow
def test_a_group_stands_for_all_its_tasks():
    found = _named.named_tasks("mmlu")
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
    "coded.yaml": "group: coded\ntask: [small]\nprocess_docs: !function utils.anything\n",
    **{f"{name}.yaml": f"task: {name}\n" for name in ("small", "other", "alone")},
}


@pytest.fixture
def lm_evals(tmp_path, monkeypatch):
    """Task files in the place of lm-eval's own."""
    for name, text in TASK_FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(_named, "_folder", lambda: tmp_path)
    _named._index.cache_clear()
    yield tmp_path
    _named._index.cache_clear()


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
    found = _named.named_tasks("outer")
    assert [(task.name, task.overrides) for task in found] == built
    assert [task.overrides["num_fewshot"] for task in found] == [2, 2, 7, 2]
    scores = [[score.group for score in task.aggregates] for task in found]
    assert scores == [["inner"], ["inner"], [], []]
    assert found[0].aggregates[0] == Aggregate(
        group="inner", metric="acc_norm", filters=("first",), by_size=False
    )


def test_a_group_that_hands_code_to_its_tasks_is_refused(lm_evals):
    with pytest.raises(BenchmarkError, match=r"'coded' is a group .* functions of its own"):
        _named.named_tasks("coded")


def test_what_a_group_changes_reaches_the_task_and_its_digest(recipe, monkeypatch):
    path = recipe / "tasks/toy_choice.yaml"
    files = {"data_files": {"test": str(recipe / "tasks/data/questions.jsonl")}}
    aggregate = Aggregate(group="g", metric="acc_norm")

    def named(changes, aggregates):
        task = _named.NamedTask(
            "toy_choice", path, {"dataset_kwargs": files, **changes}, aggregates
        )
        monkeypatch.setattr(_tasks, "named_tasks", lambda name: [task])
        (found,) = resolve_tasks(["g"], folder=recipe)
        return found

    plain, changed = named({}, ()), named({"num_fewshot": 3}, (aggregate,))
    assert plain.digest != changed.digest
    assert (plain.metric, changed.metric, changed.aggregates) == ("acc", "acc_norm", (aggregate,))
    loaded = _tasks.load(changed.name, changed.spec, where="")
    assert loaded.get_config("num_fewshot") == 3


def test_presets_name_tasks_that_lm_eval_has():
    for preset in PRESETS:
        for request in preset_tasks(preset):
            if request.task.endswith(".yaml"):
                assert Path(request.task).is_file()
            else:
                assert [task.name for task in _named.named_tasks(request.task)] == [request.task]


def test_every_task_of_the_damage_preset_is_what_it_is_taken_for():
    """By lm-eval's YAML alone: its data is on the Hub."""
    expected = {
        "lambada_openai": ("EleutherAI/lambada_openai", "loglikelihood", "acc"),
        "truthfulqa_mc2": ("truthfulqa/truthful_qa", "multiple_choice", "acc"),
        "piqa": ("baber/piqa", "multiple_choice", "acc_norm"),
        "gsm8k": ("openai/gsm8k", "generate_until", "exact_match"),
        "ifeval": ("google/IFEval", "generate_until", "prompt_level_strict_acc"),
    }
    generated = set()
    for request in preset_tasks("damage"):
        (found,) = _named.named_tasks(request.task)
        settings = _named.yaml_settings(found.path)
        metrics = {entry["metric"]: entry.get("aggregation") for entry in settings["metric_list"]}
        if request.task.startswith("mmlu_"):
            wanted = ("cais/mmlu", "multiple_choice", "acc")
            assert [score.group for score in request.aggregates] == ["mmlu_subset"]
        else:
            wanted = expected.pop(request.task)
        assert (settings["dataset_path"], settings["output_type"]) == wanted[:2]
        assert metrics[wanted[2]] == "mean"
        assert _tasks._primary_metric(request.task, _means(metrics)) == wanted[2]
        if settings["output_type"] == "generate_until":
            generated.add(request.task)
            assert request.chat_template
    assert (expected, generated) == ({}, {"gsm8k", "ifeval"})


def _means(metrics):
    from lm_eval.api.metrics import mean

    return {name: mean if how == "mean" else None for name, how in metrics.items()}


def test_the_seed_preset_has_the_seeds_tasks():
    assert [r.task for r in preset_tasks("seed")] == [
        "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande"
    ]  # fmt: skip


def test_the_demo_preset_needs_no_hub(offline, tmp_path):
    found = resolve_tasks(preset_tasks("demo"), folder=tmp_path)
    assert [(task.name, task.documents) for task in found] == [
        ("everyday_choice", 60),
        ("sums_generation", 60),
    ]


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


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Engine("vllm"), r"pip install 'lm-eval\[vllm\]'"),
        (Engine("server", "http://127.0.0.1:9/v1"), r"pip install 'lm-eval\[api\]'"),
    ],
)
def test_an_engine_that_is_not_installed_says_what_to_install(engine, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match=message):
        require_engine(engine)


def test_a_server_that_is_not_there_says_what_to_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(BenchmarkError, match=r"127\.0\.0\.1:9.*vllm serve"):
        require_engine(Engine("server", "http://127.0.0.1:9/v1"))
    with pytest.raises(BenchmarkError, match="no http address"):
        require_engine(Engine("server", "file:///etc/passwd"))


def test_a_server_that_passes_over_echo_is_refused(monkeypatch, plain):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with CompletionsServer(plain) as server:
        require_engine(Engine("server", server.url))
    silent = CompletionsServer(plain, echoes=False)
    with silent, pytest.raises(BenchmarkError, match="does not tell log-probabilities"):
        require_engine(Engine("server", silent.url))


@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("model", ["plain", "with BOS"])
def test_a_server_gives_the_numbers_of_the_model_in_process(
    plain, tiny_folder, tasks, model, chat_template
):
    pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")
    folder = plain if model == "plain" else tiny_folder("llama")
    settings = {"batch_size": 3, "limit": 8, "num_fewshot": 1, "chat_template": chat_template}
    expected = run(folder, tasks, **settings)
    with CompletionsServer(folder) as server:
        found = run(folder, tasks, engine=Engine("server", server.url), **settings)
    assert {len(asked["prompt"]) for asked in server.asked} == {3, 1, 2}
    for name, scores in found.items():
        assert scores.settings == {**expected[name].settings, "engine": "server"}
        for ours, theirs in zip(scores.scores, expected[name].scores, strict=True):
            assert ours.gold_loglik == pytest.approx(theirs.gold_loglik, abs=1e-4)
            exact = {"gold_loglik": None}
            assert ours.model_copy(update=exact) == theirs.model_copy(update=exact)


def test_the_reported_metric_follows_the_rule():
    from lm_eval.api.metrics import mean, perplexity

    both = {"acc": mean, "acc_norm": mean}
    assert _tasks._primary_metric("hellaswag", both) == "acc_norm"
    assert _tasks._primary_metric("winogrande", both) == "acc"
    assert _tasks._primary_metric("arc_easy", {"acc": mean}) == "acc"
    assert _tasks._primary_metric("lambada", {"perplexity": perplexity, "acc": mean}) == "acc"
    assert _tasks._primary_metric("other", {"word": perplexity, "strict": mean}) == "strict"
    assert _tasks._primary_metric("wikitext", {"word_perplexity": perplexity}) is None


def test_the_room_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'lm_eval', 'datasets', 'scipy'}"
    code = f"import sys, abliterator.benchmarks; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_first_use_changes_neither_the_environment_nor_where_others_log():
    code = """
import logging, os, sys
from abliterator.benchmarks._contain import lm_eval_contained
before = dict(os.environ)
with lm_eval_contained():
    import transformers
assert dict(os.environ) == before
for name in ("transformers", "huggingface_hub"):
    assert [handler.stream for handler in logging.getLogger(name).handlers] == [sys.stderr]
"""
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


# --- running tasks ---


def test_scores_say_what_was_run_and_survive_json(scores, tasks):
    choice, say = scores["toy_choice"], scores["toy_say"]
    assert (choice.metric, choice.n, len(choice.scores)) == ("acc", 30, 30)
    assert (say.metric, say.n, len(say.scores)) == ("exact_match", 30, 60)
    assert {score.filter for score in say.scores} == {"first", "raw"}
    assert choice.settings["num_fewshot"] == 0
    assert choice.settings["task_digest"] == tasks[0].digest
    assert TaskScores.model_validate_json(choice.model_dump_json()) == choice


def test_the_limit_takes_the_first_documents_and_tasks_do_not_depend_on_each_other(
    plain, tasks, scores
):
    alone = run(plain, tasks[:1], batch_size=7)["toy_choice"]
    assert alone == scores["toy_choice"]
    few = run(plain, tasks[:1], batch_size=7, limit=4)["toy_choice"]
    assert few.n == 4
    assert [s.doc_hash for s in few.scores] == [s.doc_hash for s in alone.scores[:4]]


def test_examples_and_the_chat_template_change_the_prompts(plain, tasks, scores):
    shots = run(plain, tasks[:1], batch_size=7, num_fewshot=2)["toy_choice"]
    chat = run(plain, tasks[:1], batch_size=7, chat_template=True)["toy_choice"]
    assert shots.settings["num_fewshot"] == 2
    prompts = [
        tuple(s.prompt_hash for s in run.scores) for run in (scores["toy_choice"], shots, chat)
    ]
    assert len(set(prompts)) == 3
    with pytest.raises(BenchmarkError, match="num_fewshot: 0 and 2"):
        compare_tasks({"toy_choice": scores["toy_choice"]}, {"toy_choice": shots})


def test_a_run_leaves_no_trace_in_the_process(plain, tasks, capfd):
    import numpy as np
    import torch

    def state():
        numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
        generators = [random.getstate(), numpy, torch.get_rng_state().tolist()]
        return [dict(os.environ), generators, tasks[1].spec.settings]

    torch.manual_seed(7)
    before = json.dumps(state())
    run(plain, tasks, batch_size=7, limit=2)
    assert json.dumps(state()) == before
    # lm-eval drops the second of these from what it is given.
    assert set(tasks[1].spec.settings["dataset_kwargs"]) == {"data_files", "trust_remote_code"}
    assert capfd.readouterr() == ("", "")


def test_no_chat_template_and_nan_weights_are_errors(tasks, tmp_path):
    bare = save_model(tmp_path / "bare", chat_template=False)
    with pytest.raises(
        BenchmarkError, match=r"chat template, but the tokenizer in .*bare has none"
    ):
        run(bare, tasks, batch_size=7, chat_template=True)
    broken = save_model(tmp_path / "nan", lambda model, _: model.lm_head.weight.fill_(float("nan")))
    with pytest.raises(BenchmarkError, match="'toy_choice' the model gives NaN"):
        run(broken, tasks[:1], batch_size=7)


def test_a_bfloat16_checkpoint_is_scored_without_rounding_the_softmax(tasks, tmp_path):
    import torch

    def one_ulp_apart(model, vocabulary):
        always("red")(model, vocabulary)
        model.lm_head.weight[vocabulary.index("red")] = 4.0
        model.lm_head.weight[vocabulary.index("yes")] = 1 / 16
        model.lm_head.weight[vocabulary.index("no")] = (1 + 2**-7) / 16
        model.to(torch.bfloat16)

    # Logits 64, 1 and 1.0078 are exact in bfloat16, but -63 and -62.992 are one number there.
    folder = save_model(tmp_path, one_ulp_apart)
    scores = run(folder, tasks[:1], batch_size=1)["toy_choice"].scores
    assert [score.value for score in scores] == [float(doc["label"] == 1) for doc in QUESTIONS]


@pytest.mark.slow
@pytest.mark.parametrize("chat_template", [False, True])
def test_lm_evals_own_command_line_gives_the_same_numbers(
    recipe, plain, tasks, tmp_path, chat_template
):
    for task in (CHOICE, SAY):
        files = {"data_files": {"test": str(recipe / "tasks/data/questions.jsonl")}}
        (tmp_path / f"{task['task']}.yaml").write_text(
            yaml.safe_dump(task | {"dataset_kwargs": files})
        )
    options = {
        "model": "hf",
        "model_args": f"pretrained={plain},softmax_dtype=float32",
        "device": "cpu",
        "batch_size": "7",
        "num_fewshot": "1",
        "tasks": f"{tmp_path}/toy_choice.yaml,{tmp_path}/toy_say.yaml",
        "output_path": str(tmp_path / "out"),
    }
    flags = ["--log_samples", *["--apply_chat_template"] * chat_template]
    for option, value in options.items():
        flags += [f"--{option}", value]
    subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *flags],
        check=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    ours = run(plain, tasks, batch_size=7, num_fewshot=1, chat_template=chat_template)
    (totals,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(totals.read_text())["results"]
    for name, mine in ours.items():
        (samples,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        theirs = [json.loads(line) for line in samples.read_text().splitlines()]
        keys = ("doc_id", "filter", "doc_hash", "prompt_hash", "target_hash")
        assert [tuple(getattr(s, k) for k in (*keys, "value")) for s in mine.scores] == [
            tuple(s[k] for k in (*keys, mine.metric)) for s in theirs
        ]
        for name_of_filter in {score.filter for score in mine.scores}:
            values = [score.value for score in mine.scores if score.filter == name_of_filter]
            assert sum(values) / len(values) == results[name][f"{mine.metric},{name_of_filter}"]


# --- comparing ---


def test_a_model_against_itself_has_deltas_of_zero(plain, tasks, scores):
    for result in compare_tasks(scores, run(plain, tasks, batch_size=7)).values():
        assert (result.n, result.delta.value, result.delta.n) == (30, 0.0, 30)
        assert result.base == result.edited
        assert result.smallest_detectable is None  # no difference, so no idea of its spread


@pytest.mark.parametrize("chat_template", [False, True])
def test_models_that_differ_by_construction_show_the_right_sign(
    says_no, says_yes, tasks, chat_template
):
    no, yes = (
        run(folder, tasks, batch_size=4, chat_template=chat_template)
        for folder in (says_no, says_yes)
    )
    results = compare_tasks(no, yes)
    assert set(results) == {"toy_choice", "toy_say,first", "toy_say,raw"}
    for key in ("toy_choice", "toy_say,first"):
        result = results[key]
        assert (result.base.value, result.edited.value) == (1 - YES / 30, YES / 30)
        assert result.delta.value == pytest.approx(2 * YES / 30 - 1)
        assert result.base.low < result.base.value < result.base.high
        assert result.smallest_detectable > 0
    assert results["toy_say,raw"].edited.value == 0  # "yes yes yes" is not "yes"
    back = compare_tasks(yes, no)["toy_choice"]
    assert back.delta.value == -results["toy_choice"].delta.value


def edit_first(scores: TaskScores, **changes) -> TaskScores:
    first, *rest = scores.scores
    return scores.model_copy(update={"scores": (first.model_copy(update=changes), *rest)})


def test_runs_on_other_documents_prompts_or_settings_are_not_compared(scores):
    base = {"toy_choice": scores["toy_choice"]}

    def compared(edited):
        return compare_tasks(base, {"toy_choice": edited})

    choice = scores["toy_choice"]
    for field in ("doc_hash", "prompt_hash", "target_hash"):
        with pytest.raises(BenchmarkError, match=f"Document 0 .* another {field}"):
            compared(edit_first(choice, **{field: "0" * 64}))
    with pytest.raises(
        BenchmarkError, match="30 scored documents on base and 29 on edited; document 0"
    ):
        compared(choice.model_copy(update={"scores": choice.scores[1:]}))
    with pytest.raises(BenchmarkError, match="batch_size: 7 and 8"):
        compared(choice.model_copy(update={"settings": {**choice.settings, "batch_size": 8}}))
    with pytest.raises(BenchmarkError, match="different tasks"):
        compare_tasks(base, scores)
    assert (
        compared(edit_first(choice, value=1 - choice.scores[0].value))["toy_choice"].delta.value
        != 0
    )


def test_pairs_are_joined_on_the_document_not_on_the_order(scores):
    choice = scores["toy_choice"]
    turned = choice.model_copy(update={"scores": choice.scores[::-1]})
    assert compare_tasks({"t": choice}, {"t": turned}) == compare_tasks(
        {"t": choice}, {"t": choice}
    )


def scored(values, *, task="t", aggregates=(), gold=None, filter="none") -> TaskScores:
    docs = tuple(
        DocScore(
            doc_id=i, filter=filter, doc_hash=str(i), prompt_hash="p", target_hash="t", value=value,
            gold_loglik=None if gold is None else gold[i],
        )
        for i, value in enumerate(values)
    )  # fmt: skip
    return TaskScores(
        task=task, metric="acc", n=len(docs), higher_is_better=True, scores=docs, settings={},
        aggregates=aggregates,
    )  # fmt: skip


def test_flips_and_their_p_value_are_mcnemars():
    base, edited = [1.0] * 12 + [0.0] * 8, [1.0] * 2 + [0.0] * 17 + [1.0]
    result = compare_tasks({"t": scored(base)}, {"t": scored(edited)})["t"]
    assert (result.lost, result.gained) == (10, 1)
    tail = sum(math.comb(11, k) for k in (0, 1))
    assert result.p_value == pytest.approx(2 * tail / 2**11)
    assert result.p_holm == result.p_value  # alone, nothing to correct for


def test_holm_by_hand():
    def flips(lost):
        return [1.0] * 20, [0.0] * lost + [1.0] * (20 - lost)

    sides = {name: flips(lost) for name, lost in {"a": 8, "b": 6, "c": 1, "d": 5}.items()}
    base = {name: scored(before, task=name) for name, (before, _) in sides.items()}
    edited = {name: scored(after, task=name) for name, (_, after) in sides.items()}
    results = compare_tasks(base, edited)
    p = {name: 2 / 2**lost for name, lost in {"a": 8, "b": 6, "d": 5}.items()} | {"c": 1.0}
    assert {name: result.p_value for name, result in results.items()} == pytest.approx(p)
    expected = {"a": 4 * p["a"], "b": 3 * p["b"], "d": max(3 * p["b"], 2 * p["d"]), "c": 1.0}
    assert {name: result.p_holm for name, result in results.items()} == pytest.approx(expected)


def test_the_gold_answers_likelihood_moves_before_the_choice_does():
    base = scored([1.0, 0.0], gold=[-1.0, -2.0])
    edited = scored([1.0, 0.0], gold=[-1.5, -2.1])
    result = compare_tasks({"t": base}, {"t": edited})["t"]
    assert (result.delta.value, result.p_value) == (0, 1)
    assert result.gold_loglik.value == pytest.approx(-0.3)
    assert result.gold_loglik.n == 2


def test_values_that_are_no_right_or_wrong_get_a_sign_flip_test():
    result = compare_tasks({"t": scored([0.5, 0.4, 1])}, {"t": scored([0.25, 0.3, 0])})["t"]
    assert (result.gained, result.lost) == (None, None)
    assert result.p_value == pytest.approx(2 / 2**3)


def test_a_group_has_a_row_for_each_task_and_one_for_all_their_documents():
    group = (Aggregate(group="g", metric="acc"),)
    base = {name: scored([1, 1], task=name, aggregates=group) for name in ("a", "b")}
    edited = {
        "a": scored([1, 0], task="a", aggregates=group),
        "b": scored([0, 0], task="b", aggregates=group),
    }
    results = compare_tasks(base, edited)
    assert [(name, r.n, r.delta.value, r.lost) for name, r in results.items()] == [
        ("g", 4, -0.75, 3),
        ("a", 2, -0.5, 1),
        ("b", 2, -1.0, 2),
    ]
    assert (results["g"].settings["tasks"], results["g"].settings["mean_over"]) == (2, "documents")
    assert results["g"].delta.low < -0.75 < results["g"].delta.high


def test_a_group_that_counts_tasks_alike_gives_the_mean_of_their_means():
    group = (Aggregate(group="g", metric="acc", by_size=False),)
    sides = {"a": ([1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]), "b": ([1, 0], [0, 0])}
    base, edited = (
        {
            name: scored(values[i], task=name, aggregates=group, gold=[float(i)] * len(values[i]))
            for name, values in sides.items()
        }
        for i in (0, 1)
    )
    result = compare_tasks(base, edited)["g"]
    assert result.n == 8
    assert result.base.value == pytest.approx((4 / 6 + 1 / 2) / 2)
    assert result.delta.value == pytest.approx((-1 / 6 - 1 / 2) / 2)
    assert result.gold_loglik.value == pytest.approx(1)


def test_a_group_counts_the_filters_and_the_metric_that_it_names():
    only = (
        Aggregate(group="g", metric="acc", filters=("strict",)),
        Aggregate(group="g", metric="acc", filters=None),
    )
    both = scored([1, 1], aggregates=only[:1], filter="strict")
    lax = scored([0, 1], filter="lax").scores
    side = {"t": both.model_copy(update={"scores": (*both.scores, *lax)})}
    assert list(compare_tasks(side, side)) == ["g", "t,strict", "t,lax"]
    side = {"t": side["t"].model_copy(update={"aggregates": only[1:]})}
    assert list(compare_tasks(side, side)) == ["g,strict", "g,lax", "t,strict", "t,lax"]


# --- apart, in processes of their own


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
    sides = {"base": Subject(plain, "1"), "edited": Subject(says_no, "2")}
    seen = []
    arguments = (sides, tasks, RunSettings(batch_size=7, limit=5))

    def measured(arguments=arguments):
        return measure_sides(
            *arguments, out=tmp_path / "out", on_task=lambda side, task: seen.append((side, task))
        )

    first = measured()
    assert first["base"] == run(plain, tasks, batch_size=7, limit=5)
    assert first["edited"] == run(says_no, tasks, batch_size=7, limit=5)
    assert seen == [(side, task.name) for side in sides for task in tasks]

    asked = []
    child = _apart._run_child

    def counted(job, **options):
        asked.append((Path(job["folder"]), [task["name"] for task in job["tasks"]]))
        child(job, **options)

    monkeypatch.setattr(_apart, "_run_child", counted)
    assert measured() == first
    assert asked == []
    (tmp_path / "out/edited/toy_say.json").unlink()  # as if it had been killed there
    assert measured() == first
    assert asked == [(says_no, ["toy_say"])]


def test_too_little_memory_halves_the_batch_of_both_sides(monkeypatch, plain, tasks, tmp_path):
    asked = []

    def child(job, *, log, on_task):
        batch = job["settings"]["batch_size"]
        asked.append((Path(job["folder"]).name, batch))
        if job["folder"] == "edited" and batch > 4:
            raise _apart._OutOfMemory
        for task in job["tasks"]:
            found = scored([1.0], task=task["name"]).model_dump(mode="json")
            path = Path(job["out"]) / f"{task['name']}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"key": job["keys"][task["name"]], "scores": found}))

    monkeypatch.setattr(_apart, "_run_child", child)
    sides = {side: Subject(Path(side), side) for side in ("base", "edited")}
    measure_sides(sides, tasks, RunSettings(batch_size=16), out=tmp_path)
    assert asked == [(side, batch) for batch in (16, 8, 4) for side in ("base", "edited")]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), _apart.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), _apart.OUT_OF_MEMORY),
        (BenchmarkError("no template"), _apart.NAMED_ERROR),
    ],
)
def test_a_child_says_how_it_ended(monkeypatch, tmp_path, error, code):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(_apart, "run_tasks", fail)
    settings = dataclasses.asdict(RunSettings())
    job = {"folder": "f", "tasks": [], "settings": settings, "keys": {}, "out": "o"}
    (tmp_path / "job.json").write_text(json.dumps(job))
    with (tmp_path / "stdout").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert _apart.main(tmp_path / "job.json") == code
    if code == _apart.NAMED_ERROR:
        assert (tmp_path / "stdout").read_text() == 'error "no template"\n'


def test_what_was_scored_before_a_kill_is_not_scored_again(plain, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sides = {"base": Subject(plain, "1")}
    settings = RunSettings(batch_size=7, limit=5)

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
        asked.append(job["settings"]["batch_size"])
        with (tmp_path / "stdout").open("w") as stdout, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            code = _apart.main(job_file)
        if code == _apart.OUT_OF_MEMORY:
            raise _apart._OutOfMemory
        assert code == 0

    monkeypatch.setattr(_apart, "_run_child", child)
    sides = {side: Subject(plain, side) for side in ("base", "edited")}
    settings = RunSettings(batch_size=16, limit=10)
    found = measure_sides(sides, tasks[:1], settings, out=tmp_path / "out")
    assert asked == [16, 8, 4, 4]
    assert {side: found[side]["toy_choice"].settings["batch_size"] for side in sides} == {
        "base": 4, "edited": 4
    }  # fmt: skip


def test_errors_of_a_child_reach_the_user(tasks, tmp_path):
    bare = save_model(tmp_path / "bare", chat_template=False)
    sides = {"base": Subject(bare, "1")}
    with pytest.raises(BenchmarkError, match="has none"):
        measure_sides(sides, tasks[:1], RunSettings(chat_template=True), out=tmp_path / "out")


def test_a_task_can_have_settings_of_its_own(plain, recipe):
    request = TaskRequest("tasks/toy_choice.yaml", limit=3, num_fewshot=1, chat_template=True)
    (task,) = resolve_tasks([request], folder=recipe)
    found = run(plain, [task], batch_size=7, limit=9)["toy_choice"]
    assert (found.n, found.settings["chat_template"], found.settings["num_fewshot"]) == (3, True, 1)
