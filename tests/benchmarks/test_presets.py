"""The presets: their tasks exist, and are what they are taken for."""

from __future__ import annotations

from pathlib import Path

from abliterator.benchmarks import (
    PRESETS,
    _registry,
    _tasks,
    is_conversation,
    preset_tasks,
    resolve_tasks,
)

MMLU_SUBSET = [
    "mmlu_elementary_mathematics", "mmlu_high_school_geography", "mmlu_college_biology",
    "mmlu_computer_security", "mmlu_philosophy", "mmlu_professional_medicine",
]  # fmt: skip


def test_presets_name_tasks_that_lm_eval_has():
    for preset in PRESETS:
        for request in preset_tasks(preset):
            if request.task.endswith(".yaml"):
                assert Path(request.task).is_file()
            elif is_conversation(request):
                assert preset == "conversation"
            else:
                named = [task.name for task in _registry.registered_tasks(request.task)]
                expected = MMLU_SUBSET if request.task == "mmlu_subset" else [request.task]
                assert named == expected


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
    registered = [
        (request, task)
        for request in preset_tasks("damage")
        for task in _registry.registered_tasks(request.task)
    ]
    for request, found in registered:
        settings = _registry.yaml_settings(found.path)
        metrics = {entry["metric"]: entry.get("aggregation") for entry in settings["metric_list"]}
        if request.task == "mmlu_subset":
            assert found.name in MMLU_SUBSET
            wanted = ("cais/mmlu", "multiple_choice", "acc")
            assert [score.group for score in found.aggregates] == ["mmlu_subset"]
        else:
            assert found.name == request.task
            wanted = expected.pop(request.task)
        assert (settings["dataset_path"], settings["output_type"]) == wanted[:2]
        assert metrics[wanted[2]] == "mean"
        assert _tasks._primary_metric(found.name, _means(metrics)) == wanted[2]
        if settings["output_type"] == "generate_until":
            generated.add(found.name)
            assert request.chat_template
    assert (expected, generated) == ({}, {"gsm8k", "ifeval"})


def _means(metrics):
    from lm_eval.api.metrics import mean

    return {name: mean if how == "mean" else None for name, how in metrics.items()}


def test_the_replication_preset_has_the_replications_tasks():
    assert [r.task for r in preset_tasks("replication")] == [
        "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande"
    ]  # fmt: skip


def test_the_demo_preset_needs_no_hub(offline, tmp_path):
    found = resolve_tasks(preset_tasks("demo"), folder=tmp_path)
    assert [(task.name, task.documents) for task in found] == [
        ("everyday_choice", 60),
        ("sums_generation", 60),
    ]


def test_the_conversation_preset_is_the_whole_suite(tmp_path):
    tasks = resolve_tasks(preset_tasks("conversation"), folder=tmp_path)
    assert tasks == resolve_tasks(["conversation"], folder=tmp_path)
    assert sum(task.documents for task in tasks) == 120
    (alone,) = resolve_tasks(["conversation_tools"], folder=tmp_path)
    assert alone in tasks
