"""What models, files and servers say cannot steer the terminal."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from abliterator import costs
from abliterator.cli import main
from abliterator.cli._options import bars_of
from abliterator.cli._terminal import Bars, printable
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe

DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\r"


def is_quiet(output: str) -> bool:
    return not any(c in output for c in "\x1b\x07\x9b\u202e\r")


@given(st.text())
def test_printable_text_has_nothing_to_obey_and_json_keeps_its_value(text):
    shown = printable(text)
    assert is_quiet(shown)
    assert printable(shown) == shown
    whole = json.dumps([text], ensure_ascii=False)
    assert json.loads(printable(whole)) == [text]


@pytest.mark.parametrize(
    "text", ["plain\n\ttext", "déjà vu", "日本語", "👩‍👩‍👧", "نص عربي", "a\u200db"]
)
def test_ordinary_text_is_shown_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", HOSTILE],
        ["plan", f"./{HOSTILE}"],
        ["build", HOSTILE],
        ["build", "embedded:demo", f"--{HOSTILE}"],
        [HOSTILE],
        ["compare", HOSTILE, HOSTILE],
        ["chat", f"/no/{HOSTILE}"],
        ["bake", "--model", "embedded:demo", "--subspace", HOSTILE, "--out", "x"],
        ["verify", HOSTILE],
        ["plan", "embedded:demo", "--set", f"edit.{HOSTILE}=1"],
    ],
)
def test_arguments_are_not_obeyed(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code in (1, 2)
    assert done.output
    assert is_quiet(done.output), done.output


def test_names_of_a_models_files_and_types_are_not_obeyed(tmp_path, tiny_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    (folder / f"notes{HOSTILE}.txt").write_text("x", encoding="utf-8")
    done = CliRunner().invoke(main, ["plan", str(folder)])
    assert done.exit_code == 0, done.output
    assert is_quiet(done.output)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = HOSTILE
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = CliRunner().invoke(main, ["plan", str(folder)])
    assert done.exit_code == 1
    assert is_quiet(done.output)


def test_a_templates_error_is_not_obeyed(tmp_path, tiny_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    template = "{{ raise_exception(" + json.dumps(HOSTILE) + ") }}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    done = CliRunner().invoke(main, ["chat", str(folder), "--device", "cpu"], input="Hello?\n")
    assert done.exit_code == 1
    assert is_quiet(done.output)


def test_quiet_prints_results_alone(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("\n".join(f"Where is {x}?" for x in "abcdefgh"))
    (tmp_path / "n.txt").write_text("\n".join(f"What is {x}?" for x in "abcdefgh"))
    (tmp_path / "r.yaml").write_text(
        f"model: {tiny_folder()}\nlayers: [2]\nk: 1\nrollouts: {{max_new_tokens: 3}}\n"
        "prompts: {target: {path: t.txt}, neutral: {path: n.txt}}\n"
    )
    plain = CliRunner().invoke(main, ["directions", "r.yaml", "--out", "plain"])
    assert "[1/3] prompts" in plain.stderr
    assert "[3/3] directions" in plain.stderr
    for number, arguments in enumerate((["-q", "directions"], ["directions", "--quiet"])):
        done = CliRunner().invoke(main, [*arguments, "r.yaml", "--out", f"quiet{number}"])
        assert (done.stdout, done.stderr) == (f"quiet{number}\n", "")


def test_a_bar_has_a_rate_and_the_time_left_and_fits(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLUMNS", "80")
    bars = Bars(["bake", "rollouts"], expected=7200)
    bars.stage("rollouts", done=False)
    with bars.bar("bake", 3_000_000, unit="B") as advance:
        time.sleep(0.2)
        advance(2_000_000, status="{a status}")
    lines = stream.getvalue().replace("\r", "\n").splitlines()
    assert click.unstyle(lines[0]) == "[2/2] rollouts"
    assert "MB/s" in (shown := max(lines, key=len))
    assert "left; 0 s of up to 2 h 0 min; {a status}" in shown
    assert len(shown) <= 80


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_knows_the_builds_time_where_the_machine_was_measured(
    is_terminal, tmp_path, monkeypatch
):
    monkeypatch.setenv("ABLITERATOR_CACHE", str(tmp_path / "cache"))
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", stream)
    recipe, out = load_recipe(DEMO), tmp_path / "out"
    options = Options("cpu", "float32")
    rates = costs.assumed(costs.ACCELERATORS["h100"]).model_copy(
        update={"device": "cpu", "dtype": "float32"}
    )
    assert "of up to" not in bars_of(recipe, out, options)._format(1, 80)
    costs.remember(rates)
    assert ("of up to" in bars_of(recipe, out, options)._format(1, 80)) is is_terminal
    assert "of up to" not in Bars(expected=1e-9)._format(1, 80)  # what has passed already
