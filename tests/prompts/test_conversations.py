"""Prompts that are conversations: read, compared, stored; and what cannot be answered."""

import json

import pytest
from pydantic import TypeAdapter

from abliterator.errors import PromptError
from abliterator.prompts import (
    Conversation,
    PromptSet,
    as_read,
    comparison_key,
    drop_overlap,
    hold_out,
    load_prompts,
    next_turn,
    readable,
    turns_of,
    user_text,
)
from abliterator.recipe import Source

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
SCRIPT = ["My dog is called Rex.", "Name a planet.", "What is my dog called?"]


def said(*contents, roles="user"):
    """Messages of the user, or of the roles by their first letters: "suau"."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    roles = [names[letter] for letter in roles] if roles != "user" else ["user"] * len(contents)
    return [{"role": role, "content": c} for role, c in zip(roles, contents, strict=True)]


def conversation(*contents, roles="user", tools=()):
    return Conversation(messages=tuple(said(*contents, roles=roles)), tools=tools)


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return Source(path=path)

    return write


def test_a_row_is_a_text_or_a_conversation_with_tools(file):
    rows = [
        {"prompt": "Name a planet."},
        {"messages": said(*SCRIPT)},
        {"messages": said("Weather?"), "tools": [TOOL]},
    ]
    prompts = load_prompts("target", file(*rows)).prompts
    assert prompts == (
        "Name a planet.",
        conversation(*SCRIPT),
        conversation("Weather?", tools=(TOOL,)),
    )


def test_a_named_column_may_hold_messages(file):
    source = file({"chat": said("Hello")}).model_copy(update={"column": "chat"})
    assert load_prompts("target", source).prompts == (conversation("Hello"),)


def test_a_set_with_conversations_is_stored_and_read_again_and_texts_keep_their_digest():
    of_sets = TypeAdapter(PromptSet)
    mixed = PromptSet(name="t", prompts=("a", conversation("b", tools=(TOOL,))), source="f")
    assert of_sets.validate_json(of_sets.dump_json(mixed)) == mixed
    texts = PromptSet(name="t", prompts=("a", "ü"), source="f")
    assert texts.sha256 == "3d620a2d5837bb865261c9e9b5f773bcb79a336a3e5fd85181b5f2aa2bab9f6e"
    changed = json.loads(of_sets.dump_json(mixed))
    changed["prompts"][1]["messages"][0]["content"] = "c"
    with pytest.raises(PromptError, match="changed by hand"):
        of_sets.validate_json(json.dumps(changed))


def test_conversations_are_compared_by_all_that_the_user_says(file):
    one = conversation("Be brief.", "Hello", "Hi!", "Name a planet.", roles="suau")
    other = conversation("hello", "Good day.", "NAME a planet", roles="uau")
    assert user_text(one) == "Hello\n\nName a planet."
    assert comparison_key(one) == comparison_key(other)
    assert load_prompts("t", file({"messages": said("Hi")}, {"prompt": "hi!"})).dropped == 1
    both = PromptSet(name="t", prompts=(one, "Name a bird."), source="f")
    evaluation = PromptSet(name="e", prompts=(other,), source="f")
    assert drop_overlap(both, evaluation).prompts == ("Name a bird.",)
    training, held = hold_out(both, fraction=0.5, seed=0)
    assert {*training.prompts, *held.prompts} == {one, "Name a bird."}


def test_scripted_turns_are_read_one_after_the_other():
    script = conversation(*SCRIPT)
    assert turns_of(script) == 3
    assert [m["content"] for m in next_turn(script, []).messages] == SCRIPT[:1]
    second = next_turn(script, ["Rex, good."])
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    assert next_turn(script, ["Rex, good.", "Mars."]).text == (
        "User: My dog is called Rex.\n\nAssistant: Rex, good.\n\nUser: Name a planet.\n\n"
        "Assistant: Mars.\n\nUser: What is my dog called?"
    )
    assert script.joined().messages == (*said("\n\n".join(SCRIPT)),)
    assert as_read(script, None) == readable(script.joined())


def test_a_question_alone_reads_as_the_question():
    assert readable(conversation("Name a planet.")) == "Name a planet."
    assert (
        readable(conversation("Weather?", tools=(TOOL,))) == "Tools: get_weather\n\nUser: Weather?"
    )


def test_given_answers_are_not_asked_for_again():
    given = conversation("Be brief.", "Hello", "Hi!", "Name a planet.", roles="suau")
    assert turns_of(given) == 1
    assert next_turn(given, []) == given
    assert given.joined() == given
    with_tool = conversation("Weather?", "Let me see.", "Sunny", roles="uat")
    assert turns_of(with_tool) == 1
    assert turns_of("a text") == 1


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": []}, "the last message must be one of the user"),
        ({"messages": said("Hi", "Hello", roles="ua")}, "the last message must be one of the user"),
        ({"messages": said("Hi", "Be brief.", "Hi", roles="usu")}, "a system message comes first"),
        ({"messages": said("  ")}, "message 1 is empty"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "the content of message 1 is no"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, "message 1 has no role of system"),
        ({"messages": [{"role": "user", "text": "Hi"}]}, "the key 'text'"),
        ({"messages": ["Hi"]}, "not a list of objects"),
        ({"messages": "Hi"}, "not a list of objects"),
        ({"messages": said("Hi"), "tools": [{"type": "function"}]}, "a tool without a name"),
        ({"messages": said("Hi\0")}, "a NUL character"),
    ],
)
def test_what_no_model_can_answer_is_an_error_with_its_line(file, row, problem):
    with pytest.raises(PromptError, match=r"prompts.jsonl, line 2: .*" + problem) as raised:
        load_prompts("target", file({"prompt": "Hello"}, row))
    assert "Be brief" not in str(raised.value)
