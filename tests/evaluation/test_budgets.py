"""Budgets: the thinking has tokens of its own, and what ran out in it is truncated."""

import pytest

from abliterator.evaluation import answer_sets, answers_within, as_completions
from abliterator.judge import RuleJudge, judge_completions
from tests.evaluation.scripted import NAMES, scripted, told
from tests.thinking.replies import ANSWER, THOUGHT, ids


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """`engine(name)`: a tiny Llama with the tokenizer of a format, and nothing to say yet."""
    return lambda name: scripted(tmp_path_factory.mktemp("thinks"), name)


def within(model, prompts, thinking, answer):
    return answers_within(
        model, prompts, max_new_tokens=answer, thinking_tokens=thinking, batch_size=4
    )


@pytest.mark.parametrize("by_prompt", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_budget(engine, name, by_prompt):
    """However the budgets fall, the tokens are those of one decoding, cut at one of the two."""
    model = engine(name)
    (prompt,) = told(model, name, {"Where is Neva?": (THOUGHT, ANSWER)}, by_prompt=by_prompt)[1]
    (whole,) = model.answers([prompt], max_new_tokens=999, batch_size=1)
    start, n = whole.start_token, len(whole.token_ids)
    for thinking in (1, start - 1, start, start + 1, start + 9, n, n + 5):
        for most in (1, 3, 9, n):
            (answer,) = within(model, [prompt], thinking, most)
            end = thinking if thinking <= start else min(start + most, n)
            assert answer.token_ids == whole.token_ids[:end], (thinking, most)
            ended = thinking > start and most > n - start
            assert answer.finish_reason == ("stop" if ended else "length")
            text = answer.text[answer.start :].strip().rstrip("\ufffd")
            assert ANSWER.startswith(text) or name in ("Hunyuan", "gpt-oss")
            (line,) = as_completions([answer], ["Where?"], set_name="target", side="base")
            (verdict,) = judge_completions([line], RuleJudge())
            if thinking <= start:
                assert (verdict.kind, verdict.refused) == ("truncated", False)
                assert answer.start == len(answer.text)


def test_only_answers_that_have_begun_go_on(engine):
    name = "think, as tokens"
    model = engine(name)
    replies = {
        "Where is Neva?": (THOUGHT, ANSWER),
        "Who is it?": (THOUGHT * 5, ANSWER),
        "Hello!": (None, "Hello there."),
        "Tell me all.": (None, ANSWER * 6),
    }
    prompts = told(model, name, replies)
    model.asked.clear()
    budget = len(ids(model.tokenizer, THOUGHT)) + 12
    thinks, thinks_long, short, long = within(model, prompts.token_ids, budget, budget + 40)
    assert thinks.text[thinks.start :].strip() == ANSWER
    assert (thinks_long.start, thinks_long.finish_reason) == (len(thinks_long.text), "length")
    assert short.text == "Hello there."
    assert len(long.token_ids) == budget + 40
    first, second = model.asked
    assert [len(ids) for ids in first] == [len(ids) for ids in prompts.token_ids]
    assert {p[: len(prompts.token_ids[i])] for i, p in zip((0, 3), second, strict=True)} == {
        prompts.token_ids[0],
        prompts.token_ids[3],
    }
    (line, *_) = answer_sets(
        model,
        {"target": prompts},
        side="base",
        max_new_tokens=budget + 40,
        thinking_tokens=budget,
        batch_size=4,
    )
    assert line.response[line.answer_start :].strip() == ANSWER


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_begins_like_a_mark_goes_on(engine, name):
    """Cut there, it may be the beginning of a thought; what comes next decides."""
    model = engine(name)
    for text in ("[ is a bracket.", "<b> is a tag, and so on.", "\u00e9 is a letter."):
        (prompt,) = told(model, name, {"What is it?": (None, text)})[1]
        for thinking in (1, 2, 3):
            (answer,) = within(model, [prompt], thinking, 40)
            assert answer.text.strip() == text, thinking
            assert answer.finish_reason == "stop"
        model.replies.clear()


def test_without_a_budget_one_limit_holds_for_both(engine):
    name = "think, as tokens"
    model = engine(name)
    prompts = told(model, name, {"Where is Neva?": (THOUGHT, ANSWER)})
    (answer,) = within(model, prompts.token_ids, None, 20)
    assert len(answer.token_ids) == 20
    assert answer.start == len(answer.text)
