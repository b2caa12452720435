"""Response templates that transformers has for models whose tokenizers bring none.

Its parser reads with a template of its own what the table of formats reads without: both find the
same answer, in every format that it knows.
"""

import copy

import pytest
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
from transformers.utils.chat_parsing import parse_response

from abliterator.judge import RuleJudge, judge_completions
from abliterator.thinking import Splitter, split_text
from tests.thinking.replies import ANSWER, THOUGHT, Reply, ids, prompt_ids, tokenizer_of
from tests.thinking.test_tokens import completion

TEMPLATES = {types[0]: template for types, template in _RESPONSE_TEMPLATE_FALLBACKS.items()}


def reply_of(template):
    """A reply of a template's format, by the marks that it has for the thinking."""
    field = template["fields"]["reasoning_content"]
    words = field["open"].startswith("<think")
    return Reply(
        field["open"],
        field["close"],
        special=() if words else ("<|channel>", "<channel|>"),
        added=(field["open"], field["close"]) if words else (),
    )


@pytest.mark.parametrize("by_prompt", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["by the table", "by the template"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_both_read_the_same_answer(name, own, by_prompt):
    template = copy.deepcopy(TEMPLATES[name])
    reply = reply_of(template)
    tokenizer = tokenizer_of(reply)
    template["start_anchor"] = "<|im_start|>assistant\n"  # of the tiny tokenizer's chat
    if own:
        tokenizer.response_template = template
    opened = reply.before if by_prompt else ""
    prompt, text = prompt_ids(tokenizer, opened), reply.text.removeprefix(opened)
    theirs = parse_response(text, template, prefix=tokenizer.decode(prompt))
    assert theirs["content"] == ANSWER
    assert THOUGHT in theirs["reasoning_content"]
    splitter, tokens, seen = Splitter(tokenizer), ids(tokenizer, text), ""
    whole = splitter.split(prompt, tokens, is_cut=False)
    assert whole.answer.strip() == ANSWER
    for n in range(len(tokens) + 1):
        split = splitter.split(prompt, tokens[:n], is_cut=True)
        answer = split.answer.strip().rstrip("\ufffd")
        assert ANSWER.startswith(answer)
        assert len(answer) >= len(seen)
        seen = answer
        if not answer:
            (verdict,) = judge_completions([completion(split, "length")], RuleJudge())
            assert verdict.kind == "truncated"
    assert seen == ANSWER


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_stream_of_text(name):
    """What a terminal has so far, as text without control tokens or with them."""
    reply = reply_of(TEMPLATES[name])
    for n in range(len(reply.text) + 1):
        split = split_text(reply.text[:n], is_cut=True)
        assert ANSWER.startswith(split.answer.strip()), reply.text[:n]


def test_every_field_of_thinking_has_a_case():
    for template in _RESPONSE_TEMPLATE_FALLBACKS.values():
        assert set(template["fields"]) == {"reasoning_content", "tool_calls", "content"}
