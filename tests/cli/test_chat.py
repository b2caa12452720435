"""Talking to base and edited: the answers are those that were measured."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from abliterator import pipeline
from abliterator.cli import main
from abliterator.cli._chat import converse
from abliterator.engines import TransformersEngine
from abliterator.errors import OutputError, RecipeError
from abliterator.model import render_chat
from abliterator.recipe import load_recipe

TOKENS = 6
OPTIONS = pipeline.Options(device="cpu", dtype="float32")

EVERY_MESSAGE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_folder):
    """A build with a system prompt, and the answers that its record is made of."""
    home = tmp_path_factory.mktemp("built")
    (home / "t.txt").write_text("\n".join(f"Where is the {x}?" for x in "abcdefgh"))
    (home / "n.txt").write_text("\n".join(f"What is the {x}?" for x in "abcdefgh"))
    (home / "tiny.yaml").write_text(
        f"model: {tiny_folder()}\nlayers: [2, 1]\nk: 2\n"
        "prompts: {target: {path: t.txt}, neutral: {path: n.txt}}\n"
        f"chat: {{system: In winter.}}\nrollouts: {{max_new_tokens: {TOKENS}, batch_size: 1}}\n"
    )
    out = home / "out"
    pipeline.run_stages(load_recipe(home / "tiny.yaml"), out, until="card", options=OPTIONS)
    return out


def measured(out):
    lines = (out / "work" / "rollouts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def heard(session, side, prompt, before=()):
    pieces = []
    session.answer(side, prompt, before, pieces.append)
    return "".join(pieces)


def test_a_stream_is_the_answer_in_pieces(tiny_loaded, monkeypatch):
    loaded = tiny_loaded()
    engine = TransformersEngine(loaded)
    ids = render_chat(engine.tokenizer, "Where is the town?")
    (answer,) = engine.answers([ids], max_new_tokens=24, batch_size=1, stop_ids=(2,))
    end = answer.token_ids[7]  # any token can be one that ends
    for stop in (2, end):
        monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", stop)
        assert engine.stop_ids == tuple(sorted({2, stop}))
        (answer,) = engine.answers([ids], max_new_tokens=24, batch_size=1, stop_ids=(stop,))
        pieces = []
        engine.stream(ids, max_new_tokens=24, on_text=pieces.append)
        assert "".join(pieces) == answer.text
        assert len(pieces) > 1


def test_answers_are_those_that_were_measured(built):
    """Both sides of one loaded base, and each side alone from its files."""
    both = pipeline.open_chat(
        str(built), sides=("base", "edited"), max_new_tokens=None, options=OPTIONS
    )
    assert both.models["base"][0] is both.models["edited"][0]
    alone = pipeline.open_chat(str(built), sides=("edited",), max_new_tokens=None, options=OPTIONS)
    shipped = str(built / "checkpoint")
    published = pipeline.open_chat(shipped, sides=("edited",), max_new_tokens=None, options=OPTIONS)
    answers = measured(built)
    assert {a["response"] for a in answers if a["side"] == "base"} != {
        a["response"] for a in answers if a["side"] == "edited"
    }
    for answer in answers:
        talks = [both] if answer["side"] == "base" else [both, alone, published]
        for session in talks:
            assert heard(session, answer["side"], answer["prompt"]) == answer["response"]


def test_a_checkpoint_that_is_asked_otherwise_than_its_base_says_so(built, tmp_path, tiny_folder):
    changed = Path(shutil.copytree(built / "checkpoint", tmp_path / "changed"))
    recipe = (changed / "recipe.yaml").read_text()
    assert "model: llama\n" in recipe
    (changed / "recipe.yaml").write_text(recipe.replace("llama", str(tiny_folder()), 1))
    arguments = ["chat", str(changed), "--compare", "--max-new-tokens", "2", "--device", "cpu"]
    for template, says in ((None, False), (EVERY_MESSAGE + " The answer is", True)):
        if template is not None:
            (changed / "chat_template.jinja").write_text(template)
        done = CliRunner().invoke(main, arguments, input="Where is the a?\n")
        assert done.exit_code == 0, done.output
        assert ("beside the weights: chat template, default" in done.stderr) == says


def test_earlier_turns_are_part_of_the_conversation(built, monkeypatch):
    session = pipeline.open_chat(str(built), sides=("base",), max_new_tokens=3, options=OPTIONS)
    typed = iter(["Where is the a?", "And the b?", "", "And the b?"])
    seen = []

    def answer(self, side, prompt, before, on_text, on_answer):
        seen.append((prompt, list(before)))
        on_text("<think>Where?</think>Here.")
        on_answer("Here.")

    def type_(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(pipeline.ChatSession, "answer", answer)
    monkeypatch.setattr(builtins, "input", type_)
    converse(session)
    first = ("Where is the a?", "Here.")
    assert seen == [(first[0], []), ("And the b?", [first]), ("And the b?", [])]


def test_an_answer_can_be_stopped_and_the_talk_goes_on(built, monkeypatch, capsys):
    session = pipeline.open_chat(str(built), sides=("base",), max_new_tokens=3, options=OPTIONS)
    typed = iter(["a?", KeyboardInterrupt, "b?", EOFError])
    seen = []

    def answer(self, side, prompt, before, on_text, on_answer):
        seen.append((prompt, list(before)))
        on_text("It is")
        if prompt == "a?":
            on_answer("It is")
            raise KeyboardInterrupt
        on_text(" here.")

    def type_(_):
        what = next(typed)
        if isinstance(what, str):
            return what
        raise what

    monkeypatch.setattr(pipeline.ChatSession, "answer", answer)
    monkeypatch.setattr(builtins, "input", type_)
    converse(session)
    assert seen == [("a?", []), ("b?", [("a?", "It is")])]
    assert capsys.readouterr().out == "It is (stopped)\n\nIt is here.\n\n"


def test_turns_are_rendered_as_the_template_does(tiny_tokenizer):
    before = [("Where?", "Here.")]
    ids = render_chat(tiny_tokenizer, "When?", system="In winter.", before=before)
    assert tiny_tokenizer.decode(ids) == (
        "<s><|im_start|>system\nIn winter.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n"
        "<|im_start|>assistant\nHere.<|im_end|>\n<|im_start|>user\nWhen?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_every_line_of_a_pipe_is_a_conversation(built):
    one, two = (a for a in measured(built) if a["set"] == "target" and a["side"] == "base")
    edited = [a for a in measured(built) if a["set"] == "target" and a["side"] == "edited"]
    given = f"{one['prompt']}\n\n{two['prompt']}\n"
    arguments = ["chat", str(built), "--compare", "--device", "cpu"]
    done = CliRunner().invoke(main, arguments, input=given)
    assert done.exit_code == 0, done.stderr
    pairs = zip((one, two), edited, strict=True)
    wanted = [f"base: {b['response']}\nedited: {e['response']}\n" for b, e in pairs]
    assert done.stdout == "".join(wanted)


def test_a_base_that_nobody_names(tiny_folder):
    with pytest.raises(RecipeError, match="which model is its base"):
        pipeline.open_chat(
            str(tiny_folder()), sides=("base",), max_new_tokens=None, options=OPTIONS
        )


def test_an_unfinished_build(built, tmp_path, tiny_folder):
    recipe = load_recipe(built.parent / "tiny.yaml")
    pipeline.run_stages(recipe, tmp_path / "o", until="directions", options=OPTIONS)
    with pytest.raises(OutputError, match="no edited checkpoint yet"):
        pipeline.open_chat(
            str(tmp_path / "o"), sides=("edited",), max_new_tokens=None, options=OPTIONS
        )


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
def test_at_a_terminal(built):
    import pty

    ours, theirs = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "abliterator", "chat", str(built), "--base", "--device", "cpu"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    answer = next(a for a in measured(built) if a["side"] == "base")
    os.write(ours, f"{answer['prompt']}\n\x04".encode())
    out, err = done.communicate(timeout=120)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0, err
    assert answer["response"] in out


def talk(session, monkeypatch, *lines, answering=("edited",)):
    typed = iter(lines)
    monkeypatch.setattr(builtins, "input", lambda _: next(typed, "/quit"))
    converse(session, answering)


@pytest.fixture
def switchable(built):
    return pipeline.open_chat(
        str(built), sides=("edited",), max_new_tokens=None, options=OPTIONS, at_run_time=True
    )


def test_sides_and_strength_can_be_changed(built, switchable, monkeypatch, capsys):
    base, edited = (
        next(a for a in measured(built) if (a["side"], a["set"]) == (side, "target"))
        for side in ("base", "edited")
    )
    asked = base["prompt"]
    lines = [asked, "", "/base", asked, "", "/edited", "/strength 0", asked, "", "/strength 1"]
    talk(switchable, monkeypatch, *lines, asked, "", "/both", asked)
    shown = capsys.readouterr().out
    answers = [edited["response"], base["response"], base["response"], edited["response"]]
    both = f"base: {base['response']}\nedited: {edited['response']}\n"
    assert shown == "\n".join(answers) + "\n" + both


def test_a_file_is_a_prompt_and_a_wrong_command_is_named(
    built, switchable, monkeypatch, capsys, tmp_path
):
    answer = next(a for a in measured(built) if a["side"] == "edited")
    (tmp_path / "p.txt").write_text(answer["prompt"] + "\n")
    wrong = ["/strong", "/strength much", "/prompt missing.txt"]
    talk(switchable, monkeypatch, "/help", *wrong, f"/prompt {tmp_path / 'p.txt'}")
    output = capsys.readouterr()
    assert output.out.endswith(answer["response"] + "\n")
    assert "/strength 0.5" in output.out
    assert output.err.count("is no command") == 2
    assert "missing.txt" in output.err
