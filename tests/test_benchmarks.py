from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from abliterator.benchmarks import TaskScores, _tasks, compare_tasks, resolve_tasks, run_tasks
from abliterator.errors import BenchmarkError

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
    return run_tasks(plain, tasks, batch_size=7)


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


@pytest.mark.slow
def test_named_tasks_fail_in_preflight_with_what_to_do(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub
    from lm_eval.tasks import TaskManager

    managers = {True: TaskManager(), False: TaskManager(include_defaults=False)}
    monkeypatch.setattr(_tasks, "_task_manager", lambda *, index: managers[index])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name, message in {
        "arc_eazy": "no task named 'arc_eazy'; close to it are: .*arc_easy",
        "arc_easy": "'arc_easy'.*'allenai/ai2_arc'.*HF_HUB_OFFLINE",
        "mmlu_stem": "'mmlu_stem' is a group .*members are: .*mmlu_",
        "ai2_arc": "'ai2_arc' is a group .*members are: arc_challenge, arc_easy",
    }.items():
        with pytest.raises(BenchmarkError, match=message):
            resolve_tasks([name], folder=tmp_path)


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
    alone = run_tasks(plain, tasks[:1], batch_size=7)["toy_choice"]
    assert alone == scores["toy_choice"]
    few = run_tasks(plain, tasks[:1], batch_size=7, limit=4)["toy_choice"]
    assert few.n == 4
    assert [s.doc_hash for s in few.scores] == [s.doc_hash for s in alone.scores[:4]]


def test_examples_and_the_chat_template_change_the_prompts(plain, tasks, scores):
    shots = run_tasks(plain, tasks[:1], batch_size=7, num_fewshot=2)["toy_choice"]
    chat = run_tasks(plain, tasks[:1], batch_size=7, chat_template=True)["toy_choice"]
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
        return [dict(os.environ), generators, tasks[1].spec]

    torch.manual_seed(7)
    before = json.dumps(state())
    run_tasks(plain, tasks, batch_size=7, limit=2)
    assert json.dumps(state()) == before
    # lm-eval drops the second of these from what it is given.
    assert set(tasks[1].spec["dataset_kwargs"]) == {"data_files", "trust_remote_code"}
    assert capfd.readouterr() == ("", "")


def test_no_chat_template_and_nan_weights_are_errors(tasks, tmp_path):
    bare = save_model(tmp_path / "bare", chat_template=False)
    with pytest.raises(
        BenchmarkError, match=r"chat template, but the tokenizer in .*bare has none"
    ):
        run_tasks(bare, tasks, batch_size=7, chat_template=True)
    broken = save_model(tmp_path / "nan", lambda model, _: model.lm_head.weight.fill_(float("nan")))
    with pytest.raises(BenchmarkError, match="'toy_choice' the model gives NaN"):
        run_tasks(broken, tasks[:1], batch_size=7)


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
    scores = run_tasks(folder, tasks[:1], batch_size=1)["toy_choice"].scores
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
    ours = run_tasks(plain, tasks, batch_size=7, num_fewshot=1, chat_template=chat_template)
    (totals,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(totals.read_text())["results"]
    for name, run in ours.items():
        (samples,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        theirs = [json.loads(line) for line in samples.read_text().splitlines()]
        keys = ("doc_id", "filter", "doc_hash", "prompt_hash", "target_hash")
        assert [tuple(getattr(s, k) for k in (*keys, "value")) for s in run.scores] == [
            tuple(s[k] for k in (*keys, run.metric)) for s in theirs
        ]
        for name_of_filter in {score.filter for score in run.scores}:
            values = [score.value for score in run.scores if score.filter == name_of_filter]
            assert sum(values) / len(values) == results[name][f"{run.metric},{name_of_filter}"]


# --- comparing ---


def test_a_model_against_itself_has_deltas_of_zero(plain, tasks, scores):
    for result in compare_tasks(scores, run_tasks(plain, tasks, batch_size=7)).values():
        assert (result.n, result.delta.value, result.delta.n) == (30, 0.0, 30)
        assert result.base == result.edited
        assert result.smallest_detectable is None  # no difference, so no idea of its spread


@pytest.mark.parametrize("chat_template", [False, True])
def test_models_that_differ_by_construction_show_the_right_sign(
    says_no, says_yes, tasks, chat_template
):
    no, yes = (
        run_tasks(folder, tasks, batch_size=4, chat_template=chat_template)
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
