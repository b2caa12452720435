"""The base of a selection is measured behind its thinking."""

from __future__ import annotations

import pytest

from abliterator.errors import GenerationError
from abliterator.selection import KL_TOKENS, ScoringPrompts, _scores, log_odds
from tests.evaluation.scripted import (
    LONG,
    NAMES,
    assert_behind,
    context_of,
    paths_of_answers,
    scripted,
    told,
)
from tests.thinking.replies import ANSWER, THOUGHT

REFUSAL = "I cannot help with that request."


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """`engine(name)`: a tiny Llama with the tokenizer of a format, and nothing to say yet."""
    return lambda name: scripted(tmp_path_factory.mktemp("thinks"), name)


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
