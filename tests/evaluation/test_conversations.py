"""Scripted turns answered one after the other, by a real tiny model, and the suite by it."""

import json
import shutil

import pytest

from abliterator.benchmarks import compare_tasks, resolve_tasks
from abliterator.engines import TransformersEngine
from abliterator.evaluation import (
    RenderedPrompts,
    answer_conversations,
    answer_sets,
    kept_answers,
    score_conversations,
    spoken,
)
from abliterator.model import Limits, load_model, render_prompts
from abliterator.prompts import Conversation, next_turn
from abliterator.recipe import Benchmarks, Chat

TOKENS = 4


def script(*turns):
    return Conversation(messages=tuple({"role": "user", "content": turn} for turn in turns))


PROMPTS = ["Name a bird.", script("Hello", "Name a tree.", "Why?"), script("Good day", "Who?")]


@pytest.fixture
def engine(tiny_loaded):
    return TransformersEngine(tiny_loaded("llama"))


def render(engine):
    return lambda prompts: render_prompts(engine.tokenizer, prompts, Limits(), name="target")


def test_every_turn_is_read_with_the_answers_before(engine):
    transcripts = answer_conversations(
        engine, PROMPTS, render(engine), max_new_tokens=TOKENS, batch_size=1
    )
    assert [len(answers) for answers in transcripts] == [1, 3, 2]
    for prompt, answers in zip(PROMPTS, transcripts, strict=True):
        for turn, answer in enumerate(answers):
            so_far = next_turn(prompt, spoken(answers[:turn]))
            (alone,) = engine.answers(render(engine)([so_far]), max_new_tokens=TOKENS, batch_size=1)
            assert answer == alone


def test_kept_answers_are_not_given_again(engine):
    class Kept(dict):
        def update(self, answers):
            if len(self) >= self.most:
                raise KeyboardInterrupt
            super().update(answers)

    options = {"max_new_tokens": TOKENS, "batch_size": 2}
    whole = answer_conversations(engine, PROMPTS, render(engine), **options)
    for most in range(4):
        kept = Kept()
        kept.most = most
        with pytest.raises(KeyboardInterrupt):
            answer_conversations(engine, PROMPTS, render(engine), answered=kept, **options)
        assert kept_answers(PROMPTS, kept) is None
        n_kept, kept.most, done = len(kept), 99, []
        again = answer_conversations(
            engine, PROMPTS, render(engine), answered=kept, on_batch=done.append, **options
        )
        assert again == whole == kept_answers(PROMPTS, kept)
        assert sum(done) == 6 - n_kept


def test_rollouts_hold_what_was_read_and_all_answers(engine):
    sets = {"target": RenderedPrompts(PROMPTS, render(engine)(PROMPTS))}
    lines = answer_sets(
        engine,
        sets,
        side="base",
        max_new_tokens=TOKENS,
        batch_size=4,
        render=lambda name, prompts: render(engine)(prompts),
    )
    assert [(line.index, len(line.earlier)) for line in lines] == [(0, 0), (1, 2), (2, 1)]
    assert lines[0].prompt == "Name a bird."
    first, second = lines[1].earlier
    assert lines[1].prompt == (
        f"User: Hello\n\nAssistant: {first}\n\nUser: Name a tree.\n\nAssistant: {second}\n\n"
        "User: Why?"
    )


@pytest.fixture
def long_engine(tiny_folder, tmp_path):
    """A tiny model that reads 4,096 tokens, not 256: its distances are rotations."""
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return TransformersEngine(load_model(folder, device="cpu", dtype="float32"))


def test_the_suite_is_graded_and_the_base_equals_itself(long_engine, tmp_path):
    tasks = resolve_tasks(["conversation_stopping", "conversation_tools"], folder=tmp_path)
    section = Benchmarks(tasks=("conversation",), limit=4, batch_size=3)
    scores = {
        task.name: score_conversations(long_engine, task, section, Chat(), settings={})
        for task in tasks
    }
    stopping, tools = scores.values()
    assert tools.settings["tools"] == "described"  # the tiny model's template has no place for them
    assert [len(s.scores) for s in (stopping, tools)] == [4, 4]
    assert all(s.text.count("\n\nAssistant: ") == 3 for s in stopping.scores)
    results = compare_tasks(scores, scores)
    assert list(results) == ["conversation", *scores]
    assert results["conversation"].n == 8
    assert all(result.delta.value == 0 for result in results.values())
