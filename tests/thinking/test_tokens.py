"""Generated tokens: the thinking is never part of the answer, whoever opened it, wherever cut."""

from __future__ import annotations

import pytest
import torch

from abliterator.engines import TransformersEngine
from abliterator.evaluation import RenderedPrompts, answer_sets, as_completions
from abliterator.judge import RuleJudge, judge_completions
from abliterator.record import Completion
from abliterator.thinking import Splitter
from tests.thinking.replies import (
    ANSWER,
    OPENED,
    REPLIES,
    THOUGHT,
    ids,
    load_tiny,
    prompt_ids,
    tokenizer_of,
)

CASES = [(name, False) for name in REPLIES] + [(name, True) for name in REPLIES if "," not in name]


def completion(split, finish_reason):
    return Completion(
        set="target",
        side="base",
        index=0,
        prompt="Where does Neva live?",
        response=split.thinking + split.answer,
        finish_reason=finish_reason,
        n_tokens=1,
        answer_start=len(split.thinking),
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def written(request):
    """A tokenizer, a prompt and a reply to it, of one format; opened by the prompt or not."""
    name, by_prompt = request.param
    reply = REPLIES[name]
    tokenizer = tokenizer_of(reply)
    opened = OPENED.get(name, reply.before) if by_prompt else ""
    text = reply.text.removeprefix(opened)
    assert by_prompt == (text != reply.text)
    return tokenizer, prompt_ids(tokenizer, opened), ids(tokenizer, text)


def test_a_whole_reply(written):
    tokenizer, prompt, reply = written
    split = Splitter(tokenizer).split(prompt, reply, is_cut=False)
    assert split.answer.strip() == ANSWER
    assert THOUGHT in split.thinking
    (verdict,) = judge_completions([completion(split, "stop")], RuleJudge())
    assert (verdict.kind, verdict.compliance) == ("complied", 1.0)
    assert THOUGHT in verdict.thinking


def test_cut_at_every_token(written):
    """Until the answer begins there is none, and then it grows."""
    tokenizer, prompt, reply = written
    splitter, seen = Splitter(tokenizer), ""
    for n in range(len(reply) + 1):
        split = splitter.split(prompt, reply[:n], is_cut=True)
        answer = split.answer.strip().rstrip("\ufffd")
        assert ANSWER.startswith(answer), (tokenizer.decode(reply[:n]), answer)
        assert len(answer) >= len(seen)
        seen = answer
        if not answer:
            (verdict,) = judge_completions([completion(split, "length")], RuleJudge())
            assert (verdict.kind, verdict.compliance, verdict.refused) == ("truncated", 0.0, False)
    assert seen == ANSWER


def test_stopped_within_the_thought(written):
    tokenizer, prompt, reply = written
    text = tokenizer.decode(reply)
    within = ids(tokenizer, text[: text.index("harmless")])
    split = Splitter(tokenizer).split(prompt, within, is_cut=False)
    assert split.answer == ""
    (verdict,) = judge_completions([completion(split, "stop")], RuleJudge())
    assert (verdict.kind, verdict.refused) == ("empty", False)


@pytest.mark.parametrize("name", REPLIES)
def test_closed_by_the_prompt(name):
    """A template that begins and ends the thought leaves the answer alone."""
    reply = REPLIES[name]
    tokenizer = tokenizer_of(reply)
    prompt = prompt_ids(tokenizer, reply.before + "\n" + reply.between)
    split = Splitter(tokenizer).split(prompt, ids(tokenizer, ANSWER + reply.after), is_cut=False)
    assert split.answer.strip().startswith(ANSWER)
    if reply.special:
        assert split.answer.strip() == ANSWER or "Kimi" in name


def test_a_chat_format_alone_closes_nothing():
    """HyperCLOVA's mark after its thinking is what every ChatML prompt ends with."""
    tokenizer = tokenizer_of(REPLIES["think, as words"])
    splitter = Splitter(tokenizer)
    assert not splitter.opened_by(prompt_ids(tokenizer)).is_closed
    assert splitter.opened_by(prompt_ids(tokenizer, "<think>\n\n</think>\n\n")).is_closed
    thought = "assistant/think\nHm.<|im_end|>\n<|im_start|>assistant\n"
    assert splitter.opened_by(ids(tokenizer, f"<|im_start|>{thought}")).is_closed
    reply = ids(tokenizer, "<answer>Yes.</answer>")
    whole = splitter.split(prompt_ids(tokenizer), reply, is_cut=False)
    assert whole == ("", "<answer>Yes.</answer>", True)


@pytest.mark.parametrize("name", [n for n in REPLIES if n not in ("Solar Open", "Muse Glimmer")])
def test_closed_though_nothing_opened_it(name):
    reply = REPLIES[name]
    if "Granite" in name:
        pytest.skip("its marks are words, which an answer may have")
    tokenizer = tokenizer_of(reply)
    text = THOUGHT + reply.between + ANSWER + reply.after
    split = Splitter(tokenizer).split(prompt_ids(tokenizer), ids(tokenizer, text), is_cut=False)
    assert split.answer.strip() == ANSWER


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("form", ["What does {} mean?", "{}", "Say {}", "{}\nWhere is it?"])
def test_what_a_user_writes_opens_nothing(name, form):
    reply = REPLIES[name]
    tokenizer = tokenizer_of(reply)
    prompt = prompt_ids(tokenizer, asked=form.format(reply.before.strip()))
    split = Splitter(tokenizer).split(prompt, ids(tokenizer, ANSWER), is_cut=True)
    assert split == ("", ANSWER, True)


@pytest.mark.parametrize("name", ["think, as words", "think, as tokens", "Seed-OSS"])
def test_words_that_the_template_puts_into_the_thought(name):
    reply = REPLIES[name]
    tokenizer = tokenizer_of(reply)
    prompt = prompt_ids(tokenizer, reply.before + "Okay, let me see.")
    splitter = Splitter(tokenizer)
    assert splitter.split(prompt, ids(tokenizer, THOUGHT), is_cut=True).answer == ""
    whole = ids(tokenizer, THOUGHT + reply.between + ANSWER)
    assert splitter.split(prompt, whole, is_cut=False).answer.strip() == ANSWER


MENTIONS = [
    "Use the <think> tag for that.",
    "Put your notes between <think> and </think> tags, then go on.",
    "It ends with `</think>`, as it began with `<think>`.",
    'The tag is called "</think>".',
    "Write this:\n\n```\n<think>\nnotes\n</think>\nanswer\n```\n\nThat is all.",
    "An analysis of the final answer: it is fine.",
    "Here is my response: yes.",
    "I thought about it.\nHere is my thought process: walk, then eat.",
    "Their mugs say [THINK], and [/THINK] on the other side.",
    "The word thought\nis a word.",
    "analysis",
    "Final words: go home.",
]


@pytest.mark.parametrize("text", MENTIONS)
@pytest.mark.parametrize("name", ["think, as words", "think, as tokens", "gpt-oss", "Gemma 4"])
def test_what_an_answer_mentions_is_kept(name, text):
    tokenizer = tokenizer_of(REPLIES[name])
    reply = ids(tokenizer, text)
    split = Splitter(tokenizer).split(prompt_ids(tokenizer), reply, is_cut=False)
    assert split == ("", text, True)


def test_a_mention_after_the_thinking_is_kept():
    reply = REPLIES["think, as tokens"]
    tokenizer = tokenizer_of(reply)
    text = "<think>\nHm.\n</think>\n\nIt is written in <think> tags."
    split = Splitter(tokenizer).split(prompt_ids(tokenizer), ids(tokenizer, text), is_cut=True)
    assert split.answer.strip() == "It is written in <think> tags."


def test_thinking_between_the_answer_is_left_out():
    tokenizer = tokenizer_of(REPLIES["think, as tokens"])
    text = "Let me see.\n<think>\nCould it be private?\n</think>\nSure!"
    splitter, prompt = Splitter(tokenizer), prompt_ids(tokenizer)
    whole = splitter.split(prompt, ids(tokenizer, text), is_cut=False)
    assert "private" not in whole.answer
    assert whole.answer.endswith("Sure!")
    within = ids(tokenizer, text[: text.index("private")])
    assert splitter.split(prompt, within, is_cut=True).answer == ""


# A tokenizer that says how its model's replies are read


def with_template(reply, **fields):
    tokenizer = tokenizer_of(reply)
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {"content": {"close": "<|im_end|>"}, **fields},
    }
    return tokenizer


OWN = REPLIES["Apertus"]._replace(
    before="<|plan|>", between="<|said|>", special=("<|plan|>", "<|said|>")
)


@pytest.mark.parametrize("by_prompt", [False, True])
def test_a_format_that_only_the_tokenizer_knows(by_prompt):
    tokenizer = with_template(OWN, thinking={"open": "<|plan|>", "close": "<|said|>"})
    prompt = prompt_ids(tokenizer, OWN.before if by_prompt else "")
    reply = ids(tokenizer, OWN.text.removeprefix(OWN.before) if by_prompt else OWN.text)
    splitter, seen = Splitter(tokenizer), ""
    for n in range(len(reply) + 1):
        split = splitter.split(prompt, reply[:n], is_cut=True)
        assert ANSWER.startswith(split.answer)
        assert len(split.answer) >= len(seen)
        seen = split.answer
    whole = splitter.split(prompt, reply, is_cut=False)
    assert (whole.thinking, whole.answer) == (THOUGHT, ANSWER)


def test_a_template_without_thinking_leaves_the_table():
    reply = REPLIES["think, as words"]
    tokenizer = with_template(reply, tool_calls={"open": "<call>", "close": "</call>"})
    for opened in ("", reply.before):
        prompt = prompt_ids(tokenizer, opened)
        text = reply.text.removeprefix(opened)
        split = Splitter(tokenizer).split(prompt, ids(tokenizer, text), is_cut=False)
        assert split.answer.strip() == ANSWER
        within = ids(tokenizer, text[:30])
        assert Splitter(tokenizer).split(prompt, within, is_cut=True).answer == ""


@pytest.mark.parametrize(
    "template",
    [{}, [], "x", 3, {"fields": {"content": {"open_pattern": "("}}}, {"fields": {"content": None}}],
)
def test_a_template_that_does_not_work_leaves_the_table(template):
    reply = REPLIES["gpt-oss"]
    tokenizer = tokenizer_of(reply)
    tokenizer.response_template = template
    split = Splitter(tokenizer).split(
        prompt_ids(tokenizer), ids(tokenizer, reply.text), is_cut=False
    )
    assert split.answer == ANSWER


# A model that thinks so


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """`loaded(name)`: a tiny Llama with the tokenizer of a format."""
    return lambda name: load_tiny(tmp_path_factory.mktemp("thinks"), name)


def script(model, tokens):
    """Lets `model` say `tokens`, whatever it is asked."""
    steps = iter(tokens)

    def say(module, inputs, logits):
        logits = torch.zeros_like(logits)
        logits[:, -1, next(steps)] = 1
        return logits

    return model.lm_head.register_forward_hook(say)


@pytest.mark.parametrize("by_prompt", [False, True])
@pytest.mark.parametrize("name", ["gpt-oss", "Magistral", "Gemma 4", "think, as tokens"])
def test_generated_answers_have_no_thinking(loaded, name, by_prompt):
    reply, model = REPLIES[name], loaded(name)
    opened = reply.before if by_prompt else ""
    prompt = prompt_ids(model.tokenizer, opened)
    tokens = ids(model.tokenizer, reply.text.removeprefix(opened))
    cut = len(ids(model.tokenizer, reply.text[: reply.text.index("harmless")]))
    for limit in (cut, len(tokens) + 1):
        hook = script(model.model, [*tokens, 2])
        (answer,) = TransformersEngine(model).answers(
            [prompt], max_new_tokens=limit, batch_size=1, stop_ids=[2]
        )
        hook.remove()
        (line,) = as_completions([answer], ["Where?"], set_name="target", side="base")
        assert Completion.model_validate_json(line.model_dump_json()) == line
        said = line.response[line.answer_start :].strip()
        assert said == ("" if limit == cut else ANSWER)
        assert "private" in line.response
        assert "private" not in said
        (verdict,) = judge_completions([line], RuleJudge())
        assert verdict.kind == ("truncated" if limit == cut else "complied")


def test_a_stream_ends_with_the_answer(loaded):
    reply, model = REPLIES["gpt-oss"], loaded("gpt-oss")
    pieces, answers = [], []
    prompt = prompt_ids(model.tokenizer)
    hook = script(model.model, [*ids(model.tokenizer, reply.text), 2])
    engine = TransformersEngine(model)
    assert engine.stop_ids == (2,)
    engine.stream(prompt, max_new_tokens=400, on_text=pieces.append, on_end=answers.append)
    hook.remove()
    assert "private" in "".join(pieces)
    assert [a.text[a.start :] for a in answers] == [ANSWER]


def test_a_stream_that_is_stopped_has_an_answer(loaded):
    reply, model = REPLIES["think, as tokens"], loaded("think, as tokens")
    answers = []

    def hear(text):
        heard.append(text)
        if "Could" in "".join(heard) or "lives" in "".join(heard):
            raise KeyboardInterrupt

    for text, said in ((reply.text, ""), (ANSWER, "Sure!")):
        heard = []
        hook = script(model.model, [*ids(model.tokenizer, text), 2])
        with pytest.raises(KeyboardInterrupt):
            TransformersEngine(model).stream(
                prompt_ids(model.tokenizer), max_new_tokens=400, on_text=hear, on_end=answers.append
            )
        hook.remove()
        answer = answers.pop()
        assert answer.text[answer.start :].startswith(said)
        assert "private" not in answer.text[answer.start :]


def test_rollouts_have_where_the_answer_begins(loaded):
    reply, model = REPLIES["gpt-oss"], loaded("gpt-oss")
    hook = script(model.model, [*ids(model.tokenizer, reply.text), 2])
    asked = RenderedPrompts(["Where?"], [prompt_ids(model.tokenizer)])
    (line,) = answer_sets(
        TransformersEngine(model), {"target": asked}, side="base", max_new_tokens=400, batch_size=1
    )
    hook.remove()
    assert line.response[line.answer_start :] == ANSWER
