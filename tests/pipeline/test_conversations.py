"""Conversations through a build: as prompts, and as the conversation suite."""

import json
from dataclasses import replace

import pytest

from abliterator import pipeline
from abliterator.errors import PromptError
from abliterator.pipeline import write_report
from abliterator.record import Completion
from tests.pipeline.builds import FAST, Log, build, write_project
from tests.pipeline.test_interrupted import Interrupting

SUITE = ("benchmarks.tasks=[conversation_stopping]", "benchmarks.limit=3")


@pytest.fixture
def project(tmp_path, tiny_folder):
    """A recipe whose target prompts are conversations, on a tiny model that reads 4,096 tokens."""
    recipe_of = write_project(tmp_path, tiny_folder)
    config = tmp_path / "base" / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"max_position_embeddings": 4096}))
    rows = [
        {
            "messages": [
                {"role": "user", "content": text} for text in (f"The {x} is red.", f"Is {x}?")
            ]
        }
        for x in "abcdefgh"
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return lambda *overrides: recipe_of(f"prompts.target.path={tmp_path}/t.jsonl", *overrides)


def test_conversations_are_answered_turn_by_turn_and_graded(project, tmp_path):
    recipe, out = project(*SUITE), tmp_path / "out"
    record, _ = build(recipe, out)
    lines = (out / "work/rollouts.jsonl").read_text().splitlines()
    target = [c for c in map(Completion.model_validate_json, lines) if c.set == "target"]
    assert len(target) == 4  # two of eight held out, on two sides
    for completion in target:
        (answer,) = completion.earlier
        assert completion.prompt.startswith("User: The ")
        assert f"Assistant: {answer}\n\nUser: Is " in completion.prompt
    assert list(record.benchmarks) == ["conversation", "conversation_stopping"]
    suite = record.benchmarks["conversation_stopping"]
    assert (suite.metric, suite.n) == ("acc", 3)
    assert suite.p_holm is not None
    card = (out / "checkpoint/README.md").read_text()
    assert "conversation_stopping" in card
    assert "whole conversations" in card
    scores = json.loads((out / "work/benchmarks/base/conversation_stopping.json").read_text())
    assert scores["scores"]["scores"][0]["text"].count("Assistant:") == 3
    assert "conversation_stopping" in write_report([out]).read_text()
    assert build(recipe, out)[1] == []
    # another edit: the base's conversations are kept
    changed = project(*SUITE, "edit.strength=0.5")
    kept = (out / "work/benchmarks/base/conversation_stopping.json").stat().st_mtime_ns
    log = Log()
    pipeline.build(changed, out, options=replace(FAST, force=True), progress=log)
    assert "benchmarks" in log.ran
    assert (out / "work/benchmarks/base/conversation_stopping.json").stat().st_mtime_ns == kept


def test_a_suite_that_outgrows_the_model_is_an_error_before_it_runs(project, tmp_path):
    config = tmp_path / "base" / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"max_position_embeddings": 256}))
    with pytest.raises(PromptError, match="conversation_recall"):
        build(project("benchmarks.tasks=[conversation_recall]"), tmp_path / "out")


def test_answers_of_an_interrupted_suite_are_not_given_again(project, tmp_path):
    recipe, out = project(*SUITE, "benchmarks.batch_size=2"), tmp_path / "out"
    runs = [Interrupting(after=7, of="answers, conversation"), Interrupting()]
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_stages(recipe, out, until="benchmarks", options=FAST, progress=runs[0])
    pipeline.run_stages(recipe, out, until="benchmarks", options=FAST, progress=runs[1])
    for side in ("base", "edited"):
        label = f"{side} answers, conversation_stopping"
        assert runs[0].done[label] + runs[1].done[label] == 9  # three turns of three
    assert runs[0].done["edited answers, conversation_stopping"] > 0
    assert not (out / "work/partial/benchmarks").exists()
