"""Tasks are asked in the chat of the recipe; their processes get no secrets and no cwd."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from abliterator.benchmarks import (
    ScoredCheckpoint,
    _scores,
    _subprocess,
    compare_tasks,
    measure_sides,
    resolve_tasks,
)
from abliterator.benchmarks._chat import ChatRenderer
from abliterator.errors import BenchmarkError, UnsupportedModel
from abliterator.model import load_tokenizer, render_chat
from abliterator.recipe import BenchmarkEngine, BenchmarkTask
from tests.benchmarks.toy import run, run_settings, save_model, scored, server_engine
from tests.helpers.completions_server import CompletionsServer

WALKS_PARTS = (
    "{% for m in messages %}{{ m.role }} : {% for p in m.content %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}model :\n{% endif %}"
)
PLAIN = (
    "{% if loud %}{{ raise_exception('asked to be loud') }}{% endif %}"
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}model :\n{% endif %}"
)


@pytest.fixture(scope="module")
def with_template(tmp_path_factory):
    def folder(template: str) -> Path:
        where = save_model(tmp_path_factory.mktemp("model"))
        (where / "chat_template.jinja").write_text(template)
        return where

    return folder


def prompts(scores):
    return [score.prompt_hash for score in scores["toy_choice"].scores]


def test_tasks_are_asked_in_the_chat_of_the_answers(with_template, tasks):
    folder = with_template(PLAIN)
    settings = {"limit": 2, "chat_template": True}
    asked = run(folder, tasks[:1], **settings)
    with_system = run(folder, tasks[:1], system="is it red", **settings)
    assert prompts(asked) != prompts(with_system)
    assert with_system["toy_choice"].settings["system"] == "is it red"
    assert "system" not in asked["toy_choice"].settings
    with pytest.raises(UnsupportedModel, match="asked to be loud"):
        run(folder, tasks[:1], template_kwargs={"loud": True}, **settings)
    # what lm-eval's own options say goes before
    options = BenchmarkEngine(options={"chat_template_args": {"loud": False}})
    quiet = run(folder, tasks[:1], template_kwargs={"loud": True}, engine=options, **settings)
    assert prompts(quiet) == prompts(asked)
    # without the template neither is part of a prompt
    plain = run(folder, tasks[:1], limit=2, system="red", template_kwargs={"loud": True})
    assert prompts(plain) == prompts(run(folder, tasks[:1], limit=2))
    assert "system" not in plain["toy_choice"].settings


def test_the_text_is_that_of_the_answers(with_template):
    folder = with_template(PLAIN)
    chat = ChatRenderer.of(folder, run_settings(system="is it red", template_kwargs={"x": 1}))
    turns = [{"role": "system", "content": "is it red"}, {"role": "user", "content": "is red ?"}]
    tokenizer = load_tokenizer(folder)
    ids = render_chat(tokenizer, "is red ?", system="is it red", template_kwargs={"x": 1})
    assert tokenizer(chat.render(turns), add_special_tokens=False)["input_ids"] == ids


def test_parts_reach_the_model_in_tasks_too(with_template, tasks):
    """A template that walks parts gives the numbers of one that takes strings."""
    settings = {"limit": 6, "chat_template": True, "num_fewshot": 1}
    parts = run(with_template(WALKS_PARTS), tasks[:1], **settings)["toy_choice"]
    strings = run(with_template(PLAIN), tasks[:1], **settings)["toy_choice"]
    assert [s.gold_loglik for s in parts.scores] == [s.gold_loglik for s in strings.scores]


def test_a_server_is_asked_in_the_same_chat(with_template, tasks):
    pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")
    folder = with_template(WALKS_PARTS)
    settings = {"limit": 3, "chat_template": True, "system": "is it red"}
    expected = run(folder, tasks[:1], **settings)
    with CompletionsServer(folder) as server:
        found = run(folder, tasks[:1], engine=server_engine(server.url), **settings)
    assert prompts(found) == prompts(expected)
    assert found["toy_choice"].settings["system"] == "is it red"


def test_a_tasks_own_description_is_left_out_where_the_template_refuses_it(with_template):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    folder = with_template(refuses + PLAIN)
    turns = [{"role": "system", "content": "red"}, {"role": "user", "content": "is it ?"}]
    assert ChatRenderer.of(folder, run_settings()).render(turns) == "user : is it ? model :\n"
    with pytest.raises(UnsupportedModel, match="no system"):
        ChatRenderer.of(folder, run_settings(system="red")).render(turns)


def test_the_date_of_a_template_is_fixed(with_template):
    folder = with_template("{{ strftime_now('%Y-%m-%d') }} " + PLAIN)
    text = ChatRenderer.of(folder, run_settings()).render([{"role": "user", "content": "is it ?"}])
    assert text.startswith("2024-07-26 user")


def test_scores_are_kept_by_their_chat(tmp_path, tasks, recipe):
    subject = ScoredCheckpoint(tmp_path, "1")
    (chat,) = resolve_tasks(
        [BenchmarkTask(task="tasks/toy_choice.yaml", chat_template=True)], folder=recipe
    )
    plain, other = run_settings(), run_settings(system="Be brief.")
    assert _subprocess._key(subject, chat, plain, "base") != _subprocess._key(
        subject, chat, other, "base"
    )
    assert _subprocess._key(subject, chat, plain, "base") != _subprocess._key(
        subject, chat, run_settings(template_kwargs={"a": 1}), "base"
    )
    # which a task that is asked without does not read
    assert _subprocess._key(subject, tasks[0], plain, "base") == _subprocess._key(
        subject, tasks[0], other, "base"
    )


def test_a_task_that_was_asked_otherwise_is_run_again_on_both_sides(tasks, tmp_path, monkeypatch):
    """As after a template with the date of today, measured on two days by an older version."""
    asked, today = [], "1st"

    def child(job, *, log, on_task):
        name = Path(job["folder"]).name
        asked.append((name, today))
        found = scored([1.0], task="toy_choice").model_dump(mode="json")
        found["scores"][0]["prompt_hash"] = today
        kept = _scores._sealed(job["keys"]["toy_choice"], found)
        Path(job["out"]).mkdir(parents=True, exist_ok=True)
        (Path(job["out"]) / "toy_choice.json").write_text(json.dumps(kept))

    def measured():
        sides = {side: ScoredCheckpoint(Path(side), side) for side in ("base", "edited")}
        return measure_sides(sides, tasks[:1], run_settings(), out=tmp_path)

    monkeypatch.setattr(_subprocess, "_run_child", child)
    measured()
    (tmp_path / "edited/toy_choice.json").unlink()  # as if it had been killed there
    today = "2nd"
    found = measured()
    compare_tasks(found["base"], found["edited"])
    first = [("base", "1st"), ("edited", "1st")]
    assert asked == [*first, ("edited", "2nd"), ("base", "2nd"), ("edited", "2nd")]


# The process of a side

SECRETS = {
    "OPENAI_API_KEY": "a", "DEEPSEEK_API_KEY": "b", "HF_TOKEN": "c", "GITHUB_TOKEN": "d",
    "MY_SECRET": "e", "AWS_ACCESS_KEY_ID": "f", "AWS_PROFILE": "g", "DB_PASSWORD": "h",
    "GH_PAT": "i",
    "HUGGING_FACE_HUB_TOKEN": "j", "GOOGLE_APPLICATION_CREDENTIALS": "k", "MYTOKEN": "l",
    "DATABASE_URL": "postgres://me:pw@host/db", "SSH_AUTH_SOCK": "m", "JUDGE": "n",
}  # fmt: skip
HARMLESS = {
    "TOKENIZERS_PARALLELISM": "false", "PATIENCE": "1", "KEYBOARD": "us", "LANG": "C",
    "HTTPS_PROXY": "http://me:pw@proxy:1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
}  # fmt: skip


def job(kind="transformers", dataset=None, path=None):
    task = {"dataset": dataset, "spec": {"path": path}}
    servers = {"base_url": "http://a/v1", "edited_url": "http://b/v1"} if kind == "server" else {}
    section = {"engine": {"kind": kind, **servers}}
    return {"tasks": [task], "settings": {"section": section}, "secrets": ["JUDGE"]}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, set()),
        ({"kind": "vllm"}, set()),
        ({"kind": "server"}, {"OPENAI_API_KEY"}),
        ({"dataset": "allenai/ai2_arc"}, {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}),
        ({"path": "/lm_eval/tasks/gsm8k.yaml"}, {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}),
    ],
)
def test_a_process_gets_the_secrets_that_it_needs(monkeypatch, options, kept):
    for name, value in (SECRETS | HARMLESS).items():
        monkeypatch.setenv(name, value)
    found = _subprocess._environment(job(**options))
    assert SECRETS.keys() & found.keys() == kept
    assert HARMLESS.items() <= found.items()


MODULES = (
    *("abliterator", "lm_eval", "torch", "transformers", "datasets", "jinja2", "numpy"),
    *("json", "random", "encodings", "runpy", "faulthandler", "sitecustomize", "usercustomize"),
)


@pytest.mark.slow
def test_a_process_imports_nothing_from_the_working_folder_and_sees_no_secret(
    with_template, tasks, tmp_path, monkeypatch
):
    """A real process, with each of the modules in the folder in which the user works."""
    folder, ran = with_template(PLAIN), tmp_path / "ran"
    for name in MODULES:
        for place in (folder, tmp_path / "cwd"):
            place.mkdir(exist_ok=True)
            (place / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write({name!r})\n")
    on_path, seen = tmp_path / "on_path", tmp_path / "seen.jsonl"
    on_path.mkdir()
    (on_path / "sitecustomize.py").write_text(
        "import json, os, sys\n"
        f"with open({str(seen)!r}, 'a') as file:\n"
        "    print(json.dumps([dict(os.environ), sys.path]), file=file)\n"
    )
    # the empty entry stands for the working folder
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(on_path), "", *sys.path[1:]]))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for cwd in (folder, tmp_path / "cwd"):
        monkeypatch.chdir(cwd)
        measure_sides(
            {"base": ScoredCheckpoint(folder, str(cwd))},
            tasks[:1],
            run_settings(limit=1, chat_template=True),
            out=tmp_path / "out",
            secrets=["JUDGE"],
        )
    assert not ran.exists()
    processes = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(processes) >= 4  # for each folder that of the side, and that which renders its chats
    for environment, path in processes:
        assert SECRETS.keys().isdisjoint(environment)
        assert environment["PYTHONSAFEPATH"] == "1"
        assert not {"", str(folder), str(tmp_path / "cwd")} & set(path)
        assert str(on_path) in path


@pytest.mark.slow
def test_an_error_of_the_chat_reaches_the_user(with_template, tasks, tmp_path):
    folder = with_template("{{ 1/0 }}")
    with pytest.raises(BenchmarkError, match=r"cannot render a chat.*ZeroDivisionError"):
        measure_sides(
            {"base": ScoredCheckpoint(folder, "1")},
            tasks[:1],
            run_settings(limit=1, chat_template=True),
            out=tmp_path / "out",
        )
