"""Conversations through a chat template, with tools and without."""

import pytest

from abliterator.errors import UnsupportedModel
from abliterator.model import render_chat
from abliterator.prompts import Conversation
from tests.model.test_templates import SMOLVLM

WITH_TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}|{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}


@pytest.fixture
def text_of(tiny_tokenizer, monkeypatch):
    """The text that the model reads of a prompt."""

    def text(template, prompt, **options):
        monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
        return tiny_tokenizer.decode(render_chat(tiny_tokenizer, prompt, **options))

    return text


def conversation(*turns, tools=()):
    """Turns as (role, content)."""
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Conversation(messages=messages, tools=tools)


TURNS = (("user", "Hello"), ("assistant", "Hi"), ("user", "Name a bird"))


def test_a_conversation_is_rendered_as_the_same_turns_before_a_prompt(text_of):
    by_turns = text_of(PLAIN, "Name a bird", before=[("Hello", "Hi")], system="Be kind")
    assert text_of(PLAIN, conversation(*TURNS), system="Be kind") == by_turns
    assert text_of(PLAIN, conversation(("user", "Hello"))) == text_of(PLAIN, "Hello")


def test_its_own_system_message_goes_before_that_of_the_recipe(text_of):
    own = conversation(("system", "Be brief"), *TURNS)
    text = text_of(PLAIN, own, system="Be kind")
    assert text.startswith("system: Be brief\nuser: Hello")
    assert "Be kind" not in text


def test_scripted_turns_that_are_left_are_one_turn(text_of):
    script = conversation(("user", "Hello"), ("user", "Name a bird"))
    assert text_of(PLAIN, script) == text_of(PLAIN, "Hello\n\nName a bird")


def test_parts_for_templates_that_read_parts(text_of):
    assert "User: Hello<end_of_utterance>" in text_of(SMOLVLM, conversation(*TURNS))


def test_tools_their_calls_and_results_are_rendered(text_of):
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {}}}
    messages = (
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"sky": "blue"}', "name": "get_weather"},
    )
    text = text_of(WITH_TOOLS, Conversation(messages=messages, tools=(TOOL,)))
    assert text.startswith('tools: [{"type": "function", "function": {"name": "get_weather"')
    assert text.endswith('assistant: get_weather|tool: {"sky": "blue"}|assistant:')


def test_a_template_without_tools_is_an_error(text_of):
    with pytest.raises(UnsupportedModel, match="leaves out the tool 'get_weather'"):
        text_of(PLAIN, conversation(*TURNS, tools=(TOOL,)))
    no_results = PLAIN.replace("in messages", "in messages if m.role != 'tool'")
    with pytest.raises(UnsupportedModel, match="leaves out the result of a tool"):
        text_of(no_results, conversation(("user", "Hello"), ("tool", "Sunny today")))
