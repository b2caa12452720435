"""What an interrupted run finished is not done again, and the results have the same bits."""

import json
from collections import Counter
from contextlib import contextmanager

import pytest

from abliterator import pipeline
from abliterator.engines import TransformersEngine
from tests.pipeline.builds import FAST, write_project

UNTIL = "rollouts"
FILES = ("moments.safetensors", "rollouts.jsonl")
SMALL = ("rollouts.batch_size=2", "capture.max_batch_tokens=16", "directions.stack=within_layer")


class Interrupting(pipeline.Silent):
    """Counts what is done under each label, and interrupts after so many reports of some."""

    def __init__(self, after=None, of=""):
        self.after, self.of, self.done, self.total = after, of, Counter(), Counter()

    @contextmanager
    def bar(self, label, total, *, unit=""):
        self.total[label] += total

        def advance(amount, *, status=""):
            self.done[label] += amount
            if self.after is not None and self.of in label:
                self.after -= 1
                if self.after == 0:
                    raise KeyboardInterrupt

        yield advance


@pytest.fixture(params=[(), (SMALL[2],)], ids=["stacked", "within_layer"])
def run(request, tmp_path, tiny_folder):
    recipe_of = write_project(tmp_path, tiny_folder)
    text = (tmp_path / "r.yaml").read_text()
    contrast = "\n".join(f"Describe the {x}." for x in "abcdefgh")
    (tmp_path / "c.txt").write_text(contrast)
    (tmp_path / "r.yaml").write_text(
        text.replace("prompts: {", "prompts: {contrast: {path: c.txt}, ")
    )
    recipe = recipe_of(*SMALL[:2], *request.param)

    def run(out, progress):
        pipeline.run_stages(recipe, tmp_path / out, until=UNTIL, options=FAST, progress=progress)
        return {
            path.name: path.read_bytes() for path in map((tmp_path / out / "work").joinpath, FILES)
        }

    return run


def test_every_interruption_goes_on_where_it_stopped(run, tmp_path):
    whole = Interrupting()
    expected = run("whole", whole)
    counted = {label for label in whole.done if "capture" in label or "answers" in label}
    assert len(counted) == 6
    interruptions, done = 0, Counter()
    while True:  # each run is interrupted at its second report, until one has no second
        progress = Interrupting(after=2)
        try:
            files = run("out", progress)
        except KeyboardInterrupt:
            interruptions += 1
            done += progress.done
            continue
        done += progress.done
        break
    assert interruptions > 8
    assert {x: done[x] for x in counted} == {x: whole.total[x] for x in counted}
    assert files == expected
    assert not (tmp_path / "out" / "work" / "partial").exists()


@pytest.mark.parametrize("run", [()], ids=["stacked"], indirect=True)
def test_answers_of_another_recipe_are_not_kept(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("out", Interrupting(2, "answers"))
    kept = list((tmp_path / "out" / "work" / "partial" / "rollouts").iterdir())
    assert len(kept) == 1
    prompts = tmp_path / "t.txt"
    prompts.write_text(prompts.read_text().replace("Tell", "Ask"))
    whole, progress = Interrupting(), Interrupting()
    run("whole", whole)
    run("out", progress)
    assert progress.done["base answers, target"] == whole.done["base answers, target"] > 0


@pytest.mark.parametrize("run", [()], ids=["stacked"], indirect=True)
def test_an_answer_that_was_not_written_whole_is_given_again(run, tmp_path):
    expected = run("whole", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        run("out", Interrupting(2, "answers"))
    (journal,) = (tmp_path / "out" / "work" / "partial" / "rollouts").glob("*.jsonl")
    data = journal.read_bytes()
    journal.write_bytes(data[: len(data) - 5])
    assert json.loads(data.splitlines()[-1])["set"]
    assert run("out", Interrupting()) == expected


def test_answers_that_went_on_behind_a_budget_are_kept(tmp_path, tiny_folder, monkeypatch):
    """Of a model that does not think, the budget changes nothing but where answers go on."""
    recipe_of = write_project(tmp_path, tiny_folder)
    asked = []
    answers = TransformersEngine.answers

    def counted(self, prompts, *, answered=None, **options):
        missing = len(prompts) - len(answered or {})
        if missing:
            asked.append(missing)
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        return answers(self, prompts, answered=answered, **options)

    monkeypatch.setattr(TransformersEngine, "answers", counted)

    def run(out, *overrides):
        recipe = recipe_of("rollouts.max_new_tokens=6", *overrides)
        pipeline.run_stages(recipe, tmp_path / out, until=UNTIL, options=FAST)
        return (tmp_path / out / "work" / "rollouts.jsonl").read_bytes()

    stop_at = None
    plain, n = run("plain"), sum(asked)
    asked.clear()
    assert run("budget", "rollouts.thinking_tokens=2") == plain
    calls = len(asked)
    assert n < sum(asked) <= 2 * n  # all once, and those that go on again
    asked.clear()
    stop_at, finished = 2, 0
    while True:  # each run is interrupted at its second call, until one has no second
        try:
            whole = run("out", "rollouts.thinking_tokens=2")
        except KeyboardInterrupt:
            finished += 1
            asked.clear()
            continue
        break
    assert whole == plain
    assert finished + len(asked) == calls  # no call was made again
