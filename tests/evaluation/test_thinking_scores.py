"""Of a model that thinks first, what is measured of its answer begins behind the thinking."""

from __future__ import annotations

from pathlib import Path

import pytest

from abliterator.engines import AnswerPath, TransformersEngine
from abliterator.errors import GenerationError
from abliterator.evaluation import base_paths, behind_thinking
from abliterator.model import load_model, render_chat
from abliterator.selection import KL_TOKENS
from abliterator.thinking import Split, Splitter
from tests.evaluation.scripted import (
    LIMIT,
    LONG,
    NAMES,
    assert_behind,
    context_of,
    paths_of_answers,
    scripted,
    told,
)
from tests.thinking.replies import (
    ANSWER,
    OPENED,
    REPLIES,
    THOUGHT,
    ids,
    prompt_ids,
    tokenizer_of,
)

ROOT = Path(__file__).parents[2]
CASES = [(name, False) for name in REPLIES] + [(name, True) for name in REPLIES if "," not in name]


@pytest.mark.parametrize(("name", "by_prompt"), CASES)
def test_the_first_token_of_an_answer(name, by_prompt):
    """From it on, the reply is the answer, and whatever marks stand after that."""
    reply = REPLIES[name]
    tokenizer = tokenizer_of(reply)
    opened = OPENED.get(name, reply.before) if by_prompt else ""
    prompt = prompt_ids(tokenizer, opened)
    tokens = ids(tokenizer, reply.text.removeprefix(opened))
    splitter = Splitter(tokenizer)
    first = splitter.first_token(tokens, splitter.split(prompt, tokens, is_cut=False))
    rest = tokenizer.decode(tokens[first:], skip_special_tokens=True).strip()
    after = tokenizer.decode(ids(tokenizer, reply.after), skip_special_tokens=True)
    assert rest == (ANSWER + after).strip()
    assert tokenizer.decode(tokens[first + 1 :]).strip() != rest
    for n in (first, first - 1, 3):  # cut before it, there is no answer yet
        cut = splitter.split(prompt, tokens[:n], is_cut=True)
        assert splitter.first_token(tokens[:n], cut) == n
    for n in range(first + 1, len(ids(tokenizer, reply.text[: -len(reply.after) or None]))):
        cut = splitter.split(prompt, tokens[:n], is_cut=True)
        if cut.answer.strip() and not cut.answer.endswith("\ufffd"):
            assert splitter.first_token(tokens[:n], cut) == first


def test_the_first_token_of_an_answer_with_a_thought_within_it():
    tokenizer = tokenizer_of(REPLIES["think, as tokens"])
    tokens = ids(tokenizer, "Let me see.\n<think>\nCould it be private?\n</think>\n\nSure!")
    splitter = Splitter(tokenizer)
    split = splitter.split(prompt_ids(tokenizer), tokens, is_cut=False)
    assert split.answer.startswith("Let me see.")
    assert tokenizer.decode(tokens[splitter.first_token(tokens, split) :]) == "Sure!"


def test_the_first_token_of_an_answer_that_the_thought_has_too():
    tokenizer = tokenizer_of(REPLIES["think, as words"])
    tokens = ids(tokenizer, "<think>\nSure! I say Sure! then.\n</think>\n\nSure!")
    splitter = Splitter(tokenizer)
    split = splitter.split(prompt_ids(tokenizer), tokens, is_cut=False)
    first = splitter.first_token(tokens, split)
    assert tokenizer.decode(tokens[first:]) == "Sure!"
    assert splitter.first_token(tokens, Split(tokenizer.decode(tokens), "")) == len(tokens)
    assert splitter.first_token([], Split("", "")) == 0


# A model whose replies are written


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """`engine(name)`: a tiny Llama with the tokenizer of a format, and nothing to say yet."""
    return lambda name: scripted(tmp_path_factory.mktemp("thinks"), name)


FORMATS = [(name, False) for name in NAMES] + [("Magistral", True), ("gpt-oss", True)]


@pytest.mark.parametrize(("name", "by_prompt"), FORMATS)
def test_prompts_and_paths_begin_behind_the_thinking(engine, name, by_prompt):
    model = engine(name)
    replies = {"Where is Neva?": (THOUGHT, ANSWER), "Who is it?": (LONG, ANSWER)}
    prompts = told(model, name, replies, by_prompt=by_prompt)
    context = context_of(model, prompts, prompts)

    found = behind_thinking(context, prompts)
    assert found.prompts == ["Where is Neva?"]
    (extended,) = found.token_ids
    assert_behind(model, extended, prompts.token_ids[0], ANSWER)

    paths = base_paths(
        model, prompts.token_ids, tokens=KL_TOKENS, max_new_tokens=LIMIT, batch_size=4
    )
    (path,) = paths
    assert path.prompt == extended
    assert path.positions == KL_TOKENS
    compared = path.token_ids[len(extended) :]
    assert len(compared) == KL_TOKENS - 1
    assert ANSWER.startswith(model.tokenizer.decode(compared))


def test_a_prompt_that_is_answered_at_once_stays_as_it_is(engine):
    model = engine("think, as tokens")
    replies = {
        "Where is Neva?": (THOUGHT, ANSWER),
        "Hello!": (None, "Hello there."),
        "Hm?": (None, ""),
    }
    prompts = told(model, "think, as tokens", replies)
    found = behind_thinking(context_of(model, prompts, prompts), prompts)
    assert found.prompts == prompts.prompts
    assert found.token_ids[1:] == prompts.token_ids[1:]
    assert_behind(model, found.token_ids[0], prompts.token_ids[0], ANSWER)


@pytest.mark.parametrize("name", ["think, as words", "gpt-oss"])
def test_thoughts_that_are_all_cut(engine, name):
    model = engine(name)
    prompts = told(model, name, {"Where is Neva?": (LONG, ANSWER), "Who is it?": (LONG, ANSWER)})
    context = context_of(model, prompts, prompts)
    says = r"thinks for longer than 150 tokens on each of 2 prompts.*rollouts.max_new_tokens"
    with pytest.raises(GenerationError, match=says):
        behind_thinking(context, prompts)
    with pytest.raises(GenerationError, match=says):
        base_paths(model, prompts.token_ids, tokens=4, max_new_tokens=LIMIT, batch_size=4)


# A model that does not think


def test_a_blank_answer_is_no_thinking(engine):
    model, name = engine("think, as tokens"), "think, as tokens"
    prompts = told(model, name, {"Where?": (None, " " * 9), "Who?": (None, " " * 9)})
    paths = base_paths(
        model, prompts.token_ids, tokens=KL_TOKENS, max_new_tokens=LIMIT, batch_size=4
    )
    assert [path.prompt for path in paths] == [tuple(ids) for ids in prompts.token_ids]


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_paths_of_real_models_without_thinking(tokens, tiny_loaded):
    """Greedy answers of the demo model, and of one that says anything at all."""
    demo = load_model(
        ROOT / "abliterator" / "data" / "demo" / "model", device="cpu", dtype="float32"
    )
    for loaded in (demo, tiny_loaded()):
        model = TransformersEngine(loaded)
        asked = ["Where is Neva?", "Who is it?", "What is the number of the house?"]
        prompts = [render_chat(loaded.tokenizer, prompt) for prompt in asked]
        found = base_paths(model, prompts, tokens=tokens, max_new_tokens=16, batch_size=4)
        if tokens > 1:
            assert found == paths_of_answers(model, prompts, tokens)
        else:
            assert found == [AnswerPath(tuple(prompt), 1) for prompt in prompts]
