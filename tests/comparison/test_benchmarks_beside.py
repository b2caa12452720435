"""Benchmarks of copies of one model that differ in template or tokenizer."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from abliterator.benchmarks import RunSettings, StoppedChild, resolve_tasks
from abliterator.cli import main
from abliterator.comparison import (
    CompareSettings,
    compare,
    to_markdown,
)
from abliterator.prompts import load_prompts
from abliterator.recipe import Benchmarks, Source
from abliterator.source import resolve_folder
from tests.comparison.changes import ROOT, copied, replace_text, rewrite, shuffle_vocabulary


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return resolve_tasks([str(ROOT / "recipes/demo/tasks/demo_facts.yaml")], folder=tmp_path)


DEMO_CHANGES = {
    "template": (
        replace_text("chat_template.jinja", "<|assistant|>", "<|assistant|>The answer is"),
        "as_base",
    ),
    "shuffled": (rewrite("tokenizer.json", shuffle_vocabulary), "apart"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO_CHANGES)
def test_the_demo_with_another_chat_or_tokenizer(tmp_path, tasks, name):
    """Copies of one model: their refusals were 1.000 and 0.188, and 1.0 and 0.0, with p .0002."""
    change, asked = DEMO_CHANGES[name]
    base = resolve_folder("embedded:demo", revision=None).folder
    edited = copied(base, tmp_path / "edited", change)
    source = Source(path=ROOT / "recipes/demo/evaluation.jsonl", limit=16)
    settings = CompareSettings(
        prompts={"target": load_prompts("target", source).prompts},
        max_new_tokens=24,
        tasks=tasks,
        benchmarks=RunSettings(section=Benchmarks(preset=None, limit=8, chat_template=True)),
    )
    (tmp_path / "scratch").mkdir()
    found = compare(base, edited, settings, scratch=tmp_path / "scratch")
    behaviour = found.behaviour["target"]
    assert found.asked == asked
    assert behaviour.base.refusal.value == 1
    if asked == "as_base":
        assert behaviour.edited == behaviour.base
        assert behaviour.p_value["refusal"] in (None, 1)
        assert found.benchmarks["demo_facts"].delta.value == 0
        assert found.benchmarks_apart == {}
    else:
        assert behaviour.delta.refusal is None
        assert behaviour.p_value == {}
        assert found.benchmarks == {}
        own = found.benchmarks_apart["demo_facts"]
        assert own.base.value > own.edited.value
        assert "each side on its own" in to_markdown(found)


@pytest.mark.parametrize("name", DEMO_CHANGES)
def test_an_error_names_no_file_that_is_deleted(tmp_path, tasks, monkeypatch, name):
    """The log and the folder of links go with the command's temporary folder."""
    change, _ = DEMO_CHANGES[name]
    base = resolve_folder("embedded:demo", revision=None).folder
    edited = copied(base, tmp_path / "edited", change)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))

    def stop(sides, *args, out, **options):
        log = out / "edited.log"
        log.parent.mkdir(parents=True)
        log.write_text(f"Traceback:\n  in {sides['edited'].folder}\n\nKeyError: 'lorem'\n")
        raise StoppedChild(str(sides["edited"].folder), log)

    monkeypatch.setattr("abliterator.comparison._benchmarks.measure_sides", stop)
    command = ["compare", str(base), str(edited), "--tasks"]
    done = CliRunner().invoke(main, [*command, str(ROOT / "recipes/demo/tasks/demo_facts.yaml")])
    assert done.exit_code == 1
    assert f"while it scored {edited}. Its last lines: Traceback: | in {edited}" in done.stderr
    assert "KeyError: 'lorem'" in done.stderr
    assert str(tmp_path / "tmp") not in done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []
