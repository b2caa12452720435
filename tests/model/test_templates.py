"""Chat templates: the form of contents, the date, limits, and what they may not hide."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from datetime import date, datetime
from pathlib import Path

import pytest

from abliterator.errors import AbliteratorError, CheckpointError, UnsupportedModel
from abliterator.model import _render, load_tokenizer, render_chat, render_messages
from abliterator.processes import python_command

# As SmolVLM and Idefics 3 have it.
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# As LLaVA 1.5 has it.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# A string for the system prompt, parts for everybody else.
MIXED = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content | trim }}\n{% else %}"
    "{{ m.role }}: {{ m.content[0].text + '' }}\n{% endif %}{% endfor %}"
)
# Refuses a string, where the others pass over it.
STRICT = (
    "{% for m in messages %}{% if m.content is string %}{{ raise_exception('a list, please') }}"
    "{% endif %}{{ m.role }}: {{ m.content[0]['text'] }}\n{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def text_of(tiny_tokenizer, monkeypatch):
    """The text that a template writes for a prompt."""

    def text(template, prompt="Where is it?", before=(), system=None, **options):
        monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
        turns = [] if system is None else [("system", system)]
        turns += [*before, ("user", prompt)]
        messages = [{"role": role, "content": content} for role, content in turns]
        return render_messages(tiny_tokenizer, messages, **options)

    return text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            SMOLVLM,
            "<|im_start|>System: Be brief.<end_of_utterance>\nUser: And?<end_of_utterance>\n"
            "Assistant: Here.<end_of_utterance>\nUser: Where is it?<end_of_utterance>\nAssistant:",
        ),
        (LLAVA, "Be brief. USER: And? ASSISTANT: Here. USER: Where is it? ASSISTANT:"),
        (MIXED, "Be brief.\nuser: And?\nassistant: Here.\nuser: Where is it?\n"),
        (STRICT, "system: Be brief.\nuser: And?\nassistant: Here.\nuser: Where is it?\n"),
        (PLAIN, "system: Be brief.\nuser: And?\nassistant: Here.\nuser: Where is it?\n"),
    ],
    ids=["smolvlm", "llava", "mixed", "strict", "plain"],
)
def test_contents_reach_the_model_in_the_form_that_the_template_reads(text_of, template, expected):
    before = [("user", "And?"), ("assistant", "Here.")]
    assert text_of(template, before=before, system="Be brief.") == expected
    assert "Where is it?" in text_of(template)


@pytest.mark.parametrize("template", [SMOLVLM, LLAVA, STRICT])
def test_a_direction_is_not_empty_where_contents_are_parts(tiny_tokenizer, monkeypatch, template):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    one, two = (render_chat(tiny_tokenizer, text) for text in ("eat", "the old town"))
    assert one != two


@pytest.mark.parametrize(
    ("template", "system", "lacks"),
    [
        ("{% for m in messages %}{{ m.role }}:\n{% endfor %}", None, "the prompt"),
        ("{{ messages[0].text }}", None, "the prompt"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            "Be brief.",
            "the system prompt",
        ),
    ],
)
def test_a_rendering_without_the_prompt_is_a_named_error(text_of, template, system, lacks):
    with pytest.raises(UnsupportedModel, match=f"leaves out {lacks}, "):
        text_of(template, system=system)


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("m.content | trim", "  Where\n"),
        ("m.content | upper", "where is it"),
        ("m.content | replace(' ', '_')", "where is it"),
        ("m.content | replace('<', '&lt;')", "is a < b?"),
        ("m.content.split('</think>')[-1]", "where is it"),
        ("m.content.replace('<b>', '').replace('</b>', '')", "where <b>is</b> it, pray?"),
    ],
)
def test_a_template_may_trim_and_replace(text_of, content, prompt):
    assert text_of("{% for m in messages %}{{ " + content + " }}{% endfor %}", prompt)


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("m.content.split('</think>')[-1]", "What does a long thought with </think> do?"),
        ("m.content | striptags", "<what is this>"),
        ("m.content if '<tool>' not in m.content else ''", "What is <tool> for?"),
        ("m.content.split('\n')[0]", "So:\nwhere is the old town, and what is there to eat?"),
    ],
)
def test_a_prompt_that_the_template_takes_for_its_own_is_a_named_error(text_of, content, prompt):
    with pytest.raises(UnsupportedModel, match="leaves out most of a prompt"):
        text_of("{% for m in messages %}user: {{ " + content + " }}{% endfor %}", prompt)


# The date


@pytest.mark.parametrize(
    "written",
    ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%A, %d %B %Y", "%Y/%m/%d %H:%M:%S", "%I:%M %p",
     "%-d.%-m.%y", "100%% on %a", "%%d", "%j %U %W %w %u %V %G", "%c|%x|%X",
     "%D %F %T %R %e", ""],
)  # fmt: skip
@pytest.mark.parametrize("call", ["strftime_now({})", "strftime_now(format={})"])
def test_the_fixed_date_in_any_format(text_of, written, call):
    asked = call.format(f"'{written}'")
    fixed = datetime(2024, 7, 26).strftime(written)
    for template in (
        "{{ " + asked + " }}|{{ messages[0].content }}",
        "{%- set today = " + asked + " %}{{ today }}|{{ messages[0].content }}",
        "{% macro head() %}{{ " + asked + " }}{% endmacro %}{{ head() }}|{{ messages[0].content }}",
    ):
        assert text_of("{% if strftime_now is defined %}" + template + "{% endif %}") == (
            f"{fixed}|Where is it?"
        )


@pytest.mark.parametrize("start", ["\n", "  {% if true %}a{% endif %}\n", "  x", ""])
def test_the_fixed_date_leaves_a_templates_first_line_alone(text_of, start):
    rest = "{{ messages[0].content }}"
    dated = text_of(start + rest + "{{ strftime_now('') }}")
    assert dated == text_of(start + rest)


def test_what_a_template_draws_at_random_is_the_same_each_time(text_of):
    template = "{{ lipsum(n=1) }}{{ ['a', 'b', 'c', 'd'] | random }}" + PLAIN
    assert len({text_of(template) for _ in range(8)}) == 1


# What a template may take, and what it raises


RAISING = {
    "division": "{{ 1/0 }}",
    "range": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "syntax": "{% for %}",
    "unknown filter": "{{ messages | nosuchfilter }}",
    "unknown test": "{{ 1 is nosuchtest }}",
    "undefined": "{{ nothing.at.all }}",
    "type": "{{ 1 + 'a' }}",
    "key": "{{ {}['a']['b'] }}",
    "overflow": "{{ 2.0 ** 100000 }}",
    "assertion": "{{ raise_exception(messages) }}",
    "call": "{{ 5() }}",
    "include": "{% include 'x' %}",
    "extends": "{% extends 'x' %}",
    "import": "{% import 'x' as y %}",
    "sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "surrogate": "{{ '\\ud800'.encode('utf-8') }}",
    "memory": "{{ 'a' * 10**11 }}",
    "width": "{{ '%100000000000d' % 1 }}",
    "huge output": "{{ 'a' * 30000000 }}",
}


@pytest.mark.parametrize("template", RAISING.values(), ids=RAISING.keys())
def test_whatever_a_template_raises_is_one_named_error(text_of, template):
    with pytest.raises(UnsupportedModel, match="cannot render a chat without a system prompt") as e:
        text_of(template + PLAIN)
    assert len(str(e.value)) < 600
    assert text_of(PLAIN) == "user: Where is it?\n"  # the next one renders


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "within one operation": "{{ (9 ** (9 ** (8 + messages | length))) | string | length }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS.keys())
def test_time_is_bounded_for_every_prompt(text_of, monkeypatch, template):
    monkeypatch.setattr(_render, "SECONDS", 1)
    _render._end()  # one with the short limit is started
    template = "{% if 'old town' in messages[-1].content %}" + template + "{% endif %}" + PLAIN
    assert text_of(template, "Where?")
    started = time.monotonic()
    with pytest.raises(UnsupportedModel, match="took more than 1 seconds"):
        text_of(template, "Where is the old town?")
    assert time.monotonic() - started < 20
    assert text_of(template, "Where?")
    _render._end()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_process_that_somebody_ended_is_started_again(text_of):
    first = text_of(PLAIN)
    os.kill(_render._child._process.pid, signal.SIGKILL)
    _render._child._process.wait()
    assert text_of(PLAIN) == first


def test_a_text_that_the_tokenizer_cannot_encode(tiny_tokenizer):
    with pytest.raises(UnsupportedModel, match="cannot encode a prompt"):
        render_chat(tiny_tokenizer, "a lone \ud800")


# Equal to transformers


WHITESPACE = (
    "{% for m in messages %}{{ m | tojson }}\n  {% if true %}\n  x{% endif %}\n"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ now }}{{ dict(a=1) }}{{ namespace(b=2).b }}"
)


@pytest.mark.parametrize("template", [PLAIN, SMOLVLM, WHITESPACE])
def test_the_text_is_that_of_transformers(tiny_tokenizer, monkeypatch, template):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    content = "Où est «Neva»?\n\u2028 \U0001f600 'quotes\"\\"
    parts = [{"type": "text", "text": content}] if template == SMOLVLM else content
    text = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=False,
        add_generation_prompt=True,
        now="2024-01-01",
    )
    found = render_messages(
        tiny_tokenizer,
        [{"role": "user", "content": content}],
        template_kwargs={"now": date(2024, 1, 1)},
    )
    assert found == text


def test_the_last_message_can_be_left_open(text_of, tiny_tokenizer):
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "It is"}]
    text = render_messages(tiny_tokenizer, messages, continue_last=True)
    assert text == tiny_tokenizer.apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    assert text.endswith("It is")


# Where templates lie


def with_template(folder: Path, name: str | None, content: object) -> Path:
    """The folder with its template in another file, or among tokenizer_config.json's settings."""
    (folder / "chat_template.jinja").unlink()
    if name is None:
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps(settings | {"chat_template": content}))
    else:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


DEFAULT, OTHER = {"name": "default", "template": PLAIN}, {"name": "rag", "template": "x"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.json", {"chat_template": PLAIN}),
        ("processor_config.json", {"chat_template": PLAIN, "processor_class": "X"}),
        ("additional_chat_templates/default.jinja", PLAIN),
        (None, PLAIN),
        (None, [DEFAULT, OTHER]),
    ],
)
def test_where_a_template_may_lie(writable, name, content):
    tokenizer = load_tokenizer(with_template(writable, name, content))
    assert tokenizer.decode(render_chat(tokenizer, "Where?")) == "user: Where?\n"


def test_several_templates_without_a_default(writable):
    tokenizer = load_tokenizer(with_template(writable, None, [OTHER, OTHER | {"name": "tool_use"}]))
    with pytest.raises(UnsupportedModel, match=r"several chat templates \(rag, tool_use\)"):
        render_chat(tokenizer, "Where?")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.json", "{"),
        ("chat_template.json", "[1]"),
        ("chat_template.json", {"chat_template": 5}),
        ("chat_template.json", {}),
        (None, 5),
        (None, [5]),
        (None, [{"name": "default"}]),
        (None, [{"name": "default", "template": None}]),
        (None, {"default": 5}),
    ],
)
def test_a_template_that_is_none_is_a_named_error(writable, name, content):
    with pytest.raises(AbliteratorError) as error:
        render_chat(load_tokenizer(with_template(writable, name, content)), "Where?")
    assert str(error.value).count("\n") == 0


def test_a_sentencepiece_model_without_the_package_names_it(writable, monkeypatch):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (writable / name).unlink()
    (writable / "tokenizer.model").write_bytes(b"\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(CheckpointError, match="pip install sentencepiece protobuf"):
        load_tokenizer(writable)


def test_the_process_that_renders_ends_with_its_parent():
    """However that ends, its end of the pipe is closed."""
    script = Path(_render.__file__).with_name("_render_child.py")
    command = python_command(str(script), "20", str(1 << 30))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"{}\n"
        child.stdin.close()
        assert child.wait(timeout=60) == 0
