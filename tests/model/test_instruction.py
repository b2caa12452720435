"""The end of the user's own text in a rendered prompt, whatever the template does around it."""

import copy

import pytest

from abliterator.errors import UnsupportedModel
from abliterator.model import render_chat, template_tail, up_to_instruction
from tests.helpers.tiny import TEMPLATE, train_tokenizer

PROMPTS = ["which river?", "7", "assistant", "Is it\nin the old town", "user", "x <|im_end|>", "é"]
CONTENT = "{{ message['content'] }}"
TEMPLATES = {
    "plain": TEMPLATE,
    "strips": TEMPLATE.replace(CONTENT, "{{ message['content'] | trim }}"),
    "adds white space": TEMPLATE.replace(CONTENT, "{{ message['content'] }}\n\n"),
    "strips and adds": TEMPLATE.replace(CONTENT, " {{ message['content'] | trim }} "),
    "words behind it": TEMPLATE.replace(CONTENT, "{{ message['content'] }} [/INST]"),
    "thinks": TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n\n</think>\n\n{%"),
    "nothing behind it": "{% for message in messages %}" + CONTENT + "{% endfor %}",
}
SPACES = ["", " ", "\n", "\n\n  "]
_TRAINED = train_tokenizer()


def tokenizer_with(template):
    tokenizer = copy.deepcopy(_TRAINED)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_token_is_of_the_users_text(name, space):
    tokenizer = tokenizer_with(TEMPLATES[name])
    rows = up_to_instruction(tokenizer, [prompt + space for prompt in PROMPTS])
    for prompt, row in zip(PROMPTS, rows, strict=True):
        whole = render_chat(tokenizer, prompt + space)
        assert whole[: len(row)] == row  # the residual there is that of the whole prompt
        assert tokenizer.decode(row).rstrip().endswith(prompt)
        last = tokenizer.decode(row[-1:])
        assert prompt[-1] in last or last == "\ufffd"  # of two bytes, the second
        before = tokenizer.decode(row[:-1])
        assert not before.endswith(prompt)  # and no earlier one is


def test_prompts_have_offsets_of_their_own():
    """No one offset reaches it where the template's first token goes with the text's last."""
    tokenizer = tokenizer_with(TEMPLATE)
    tail = len(template_tail(tokenizer))
    rows = up_to_instruction(tokenizer, PROMPTS)
    offsets = [len(r) - len(render_chat(tokenizer, p)) for p, r in zip(PROMPTS, rows, strict=True)]
    assert set(offsets) == {-tail}
    spaced = up_to_instruction(tokenizer, ["Is it?", "Is it?  \n "])
    whole = [len(render_chat(tokenizer, p)) for p in ("Is it?", "Is it?  \n ")]
    assert spaced[0] == spaced[1]
    assert whole[0] < whole[1]


def test_a_token_of_both_belongs_to_the_text():
    """A merge of the text's last character with a line break of the template."""
    tokenizer = tokenizer_with(TEMPLATE.replace(CONTENT, "{{ message['content'] }}\n\n"))
    tokenizer.add_tokens(["?\n\n"])
    (row,) = up_to_instruction(tokenizer, ["Is it?"])
    assert tokenizer.decode(row[-1:]) == "?\n\n"


def test_a_tokenizer_without_offsets(monkeypatch):
    for name, template in TEMPLATES.items():
        tokenizer = tokenizer_with(template)
        prompts = [prompt + space for prompt in PROMPTS for space in SPACES]
        expected = up_to_instruction(tokenizer, prompts)
        with monkeypatch.context() as patched:
            patched.setattr(type(tokenizer), "is_fast", property(lambda self: False))
            assert up_to_instruction(tokenizer, prompts) == expected, name


def test_a_system_prompt_stands_before_it():
    tokenizer = tokenizer_with(TEMPLATE)
    (row,) = up_to_instruction(tokenizer, ["Is it?"], system="Be brief.")
    assert tokenizer.decode(row).count("Be brief.") == 1


def test_a_template_that_writes_other_things_after_some_prompts():
    note = "assistant\n{% if '+' in messages[-1]['content'] %}sum{% endif %}"
    tokenizer = tokenizer_with(TEMPLATE.replace("assistant\n", note))
    with pytest.raises(UnsupportedModel, match="after prompt 2 what it writes after others"):
        up_to_instruction(tokenizer, ["Is it?", "2 + 2"])
