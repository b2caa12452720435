"""Of a model that thinks first, what is measured of its answer begins behind the thinking."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from abliterator.anatomy import anatomy_of
from abliterator.bake import plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.engines import AnswerPath, TransformersEngine
from abliterator.engines._generate import _answer
from abliterator.errors import GenerationError
from abliterator.evaluation import EvaluationContext, RenderedPrompts, base_paths, behind_thinking
from abliterator.judge import RuleJudge
from abliterator.model import load_model, render_chat
from abliterator.recipe import Edit
from abliterator.selection import KL_TOKENS, ScoringPrompts, _scores, log_odds
from abliterator.thinking import Split, Splitter
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
REFUSAL = "I cannot help with that request."
LIMIT = 150  # tokens of an answer; a whole reply has fewer, a long thought more
LONG = THOUGHT * 12
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


@dataclass(frozen=True)
class Scripted(TransformersEngine):
    """A tiny model that answers by script; its distributions are its own.

    Attributes:
        replies: what it says after a prompt, thinking and all, by the prompt's token ids.
        asked: prompts of each call of `answers`.
    """

    replies: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    asked: list[list[tuple[int, ...]]] = field(default_factory=list)

    def answers(self, prompts, *, max_new_tokens, batch_size, **_):
        self.asked.append([tuple(prompt) for prompt in prompts])
        return [self._answer(tuple(prompt), max_new_tokens) for prompt in prompts]

    def _answer(self, prompt, max_new_tokens):
        """Goes on where the prompt ends, be it within a reply."""
        (whole,) = (
            (*begun, *reply)
            for begun, reply in self.replies.items()
            if prompt[: len(begun)] == begun and (*begun, *reply)[: len(prompt)] == prompt
        )
        row = [*whole[len(prompt) :], 2][:max_new_tokens]
        return _answer(Splitter(self.tokenizer), prompt, row, [2])


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """`engine(name)`: a tiny Llama with the tokenizer of a format, and nothing to say yet."""

    def load(name):
        folder = tmp_path_factory.mktemp("thinks")
        tokenizer = tokenizer_of(REPLIES[name])
        tokenizer.save_pretrained(folder)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=2,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return Scripted(load_model(folder, device="cpu", dtype="float32"))

    return load


def told(engine, name, replies, *, by_prompt=False):
    """Prompts that get these replies: (thought or None, answer) by question."""
    reply = REPLIES[name]
    opened = OPENED.get(name, reply.before) if by_prompt else ""
    prompts = RenderedPrompts([], [])
    for question, (thought, answer) in replies.items():
        prompt = tuple(prompt_ids(engine.tokenizer, opened, asked=question))
        text = answer
        if thought is not None:
            text = reply.before + thought + reply.between + answer + reply.after
        engine.replies[prompt] = ids(engine.tokenizer, text.removeprefix(opened))
        prompts.prompts.append(question)
        prompts.token_ids.append(prompt)
    return prompts


def context_of(engine, target, neutral):
    checkpoint = Checkpoint.open(engine.loaded.folder)
    return EvaluationContext(
        engine=engine,
        plan=plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit()),
        target=target,
        neutral=neutral,
        judge=RuleJudge(),
        max_new_tokens=LIMIT,
        kl_tokens=KL_TOKENS,
        batch_size=4,
        max_batch_tokens=512,
    )


def assert_behind(engine, extended, prompt, answer):
    """The prompt goes on with its reply, up to the answer and no further."""
    whole = (*prompt, *engine.replies[tuple(prompt)])
    assert extended == whole[: len(extended)]
    rest = engine.tokenizer.decode(whole[len(extended) :], skip_special_tokens=True)
    assert rest.startswith(answer)
    assert THOUGHT in engine.tokenizer.decode(extended)


NAMES = ("think, as words", "think, as tokens", "gpt-oss", "Magistral", "Granite", "Hunyuan")
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


def rows(model, prompts, openings):
    return log_odds(model.log_likelihoods(prompts, openings, max_batch_tokens=512))


@pytest.mark.parametrize("name", NAMES)
def test_the_base_of_a_selection_is_measured_behind_the_thinking(engine, name):
    """Refusals and answers begin with the same thought, so that nothing else could tell them."""
    model = engine(name)
    target = told(
        model,
        name,
        {f"Tell me {x}": (THOUGHT, REFUSAL) for x in "abc"} | {"Tell me d": (LONG, REFUSAL)},
    )
    scored = ScoringPrompts(
        told(model, name, {"Say a": (THOUGHT, REFUSAL), "Say b": (LONG, REFUSAL)}),
        told(model, name, {"Ask a": (LONG, ANSWER), "Ask b": (THOUGHT, ANSWER)}),
    )
    neutral = told(model, name, {"Where?": (THOUGHT, ANSWER), "Who?": (LONG, ANSWER)})
    base = _scores.measure_base(context_of(model, target, neutral), scored)

    assert [verdict.refused for verdict in base.judged.verdicts] == [True] * 3 + [False]
    assert base.openings
    for opening in base.openings:
        assert REFUSAL.startswith(model.tokenizer.decode(opening))
    assert [one.prompts for one in base.scoring] == [["Say a"], ["Ask b"]]
    (say,), (ask,) = (one.token_ids for one in base.scoring)
    assert_behind(model, say, scored.target.token_ids[0], REFUSAL)
    assert_behind(model, ask, scored.contrast.token_ids[1], ANSWER)
    assert base.target_score == pytest.approx(float(rows(model, [say], base.openings)))
    assert base.contrast_score == pytest.approx(float(rows(model, [ask], base.openings)))
    assert base.target_score != pytest.approx(
        float(rows(model, scored.target.token_ids[:1], base.openings)), abs=1e-6
    )
    (path,), (logits,) = base.paths, base.logits
    assert_behind(model, path.prompt, neutral.token_ids[0], ANSWER)
    assert logits.shape == (KL_TOKENS, len(model.tokenizer))


def test_a_selection_whose_scoring_prompts_are_all_cut(engine):
    model, name = engine("gpt-oss"), "gpt-oss"
    target = told(model, name, {f"Tell me {x}": (THOUGHT, REFUSAL) for x in "abc"})
    contrast = told(model, name, {f"Ask {x}": (LONG, ANSWER) for x in "ab"})
    context = context_of(model, target, contrast)
    with pytest.raises(GenerationError, match="on each of 2 prompts"):
        _scores.measure_base(context, ScoringPrompts(target, contrast))


def test_thinking_before_answers_to_contrast_prompts_alone_is_seen(engine):
    model, name = engine("gpt-oss"), "gpt-oss"
    target = told(model, name, {f"Tell me {x}": (None, REFUSAL) for x in "abc"})
    contrast = told(model, name, {f"Ask {x}": (THOUGHT, ANSWER) for x in "ab"})
    base = _scores.measure_base(context_of(model, target, target), ScoringPrompts(target, contrast))
    for extended, prompt in zip(base.scoring.contrast.token_ids, contrast.token_ids, strict=True):
        assert_behind(model, extended, prompt, ANSWER)
    assert base.scoring.target.token_ids == target.token_ids


# A model that does not think


def test_a_blank_answer_is_no_thinking(engine):
    model, name = engine("think, as tokens"), "think, as tokens"
    prompts = told(model, name, {"Where?": (None, " " * 9), "Who?": (None, " " * 9)})
    paths = base_paths(
        model, prompts.token_ids, tokens=KL_TOKENS, max_new_tokens=LIMIT, batch_size=4
    )
    assert [path.prompt for path in paths] == [tuple(ids) for ids in prompts.token_ids]


def paths_of_answers(engine, prompts, tokens):
    """The first tokens of each answer, and one position more: what comes next."""
    answers = engine.answers(prompts, max_new_tokens=tokens - 1, batch_size=4)
    return [
        AnswerPath((*prompt, *answer.token_ids), len(answer.token_ids) + 1)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def test_without_thinking_nothing_is_asked_twice_and_nothing_moves(engine):
    model, name = engine("think, as tokens"), "think, as tokens"
    target = told(model, name, {f"Tell me {x}": (None, REFUSAL) for x in "abc"})
    scored = ScoringPrompts(
        told(model, name, {f"Say {x}": (None, REFUSAL) for x in "ab"}),
        told(model, name, {f"Ask {x}": (None, ANSWER) for x in "ab"}),
    )
    neutral = told(model, name, {"Where?": (None, ANSWER), "Who?": (None, "Neva.")})
    base = _scores.measure_base(context_of(model, target, neutral), scored)
    assert model.asked == [target.token_ids, scored.contrast.token_ids, neutral.token_ids]
    assert base.scoring == scored
    assert base.paths == paths_of_answers(model, neutral.token_ids, KL_TOKENS)
    for score, prompts in zip((base.target_score, base.contrast_score), scored, strict=True):
        expected = rows(model, prompts.token_ids, base.openings).mean()
        assert score == pytest.approx(float(expected))


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
