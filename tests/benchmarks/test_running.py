"""Scores of one model: lm-eval's own numbers, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
import yaml

from abliterator.benchmarks import ScoredCheckpoint, TaskScores, compare_tasks, measure_sides
from abliterator.errors import BenchmarkError
from tests.benchmarks.toy import CHOICE, QUESTIONS, SAY, always, run, run_settings, save_model


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


def test_a_run_leaves_no_trace_in_the_process(plain, tasks, capfd, tmp_path, monkeypatch):
    import numpy as np
    import torch

    def state():
        numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
        generators = [random.getstate(), numpy, torch.get_rng_state().tolist()]
        return [dict(os.environ), generators, tasks[1].spec.settings]

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(7)
    before = json.dumps(state())
    sides = {"base": ScoredCheckpoint(plain, "1")}
    measure_sides(sides, tasks, run_settings(batch_size=7, limit=2), out=tmp_path / "out")
    assert json.dumps(state()) == before
    # what runs in the child changes its random generators and nothing else
    run(plain, tasks, batch_size=7, limit=2)
    environment, _, settings = state()
    assert [environment, settings] == [json.loads(before)[i] for i in (0, 2)]
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
