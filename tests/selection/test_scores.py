"""Cheap scores and judged answers of edits, against one at a time."""

from dataclasses import replace

import pytest
import torch

from abliterator.bake import preview_edit
from abliterator.directions import Directions, Place, stack
from abliterator.engines import Answer, Steering
from abliterator.evaluation import JudgedAnswers
from abliterator.judge import Judgement, RuleJudge
from abliterator.model import hooked
from abliterator.record import Estimate
from abliterator.selection import Pool, _grow, _scores, judge_edits, log_odds
from abliterator.subspace import random_basis
from tests.selection.contexts import removed, unedited
from tests.selection.scripted import PROMPTS


def mean_log_odds(context, openings):
    """Of the model as it is, whatever hooks are on it."""
    likelihoods = context.engine.log_likelihoods(PROMPTS, openings, max_batch_tokens=64)
    return float(log_odds(likelihoods).mean())


def steered(context, layers, directions):
    edits = [Steering(*both) for both in zip(layers, directions, strict=True)]
    return context.engine.edited_side_by_side(edits, max_batch_tokens=64)


def test_scores_of_a_candidate(context, base):
    """Under its edit the direction is gone; added, it moves the residual stream at its layer."""
    direction = torch.zeros(32, dtype=torch.float64)
    direction[3] = 5.0
    directions = Directions(direction.repeat(3, 1))
    basis = stack(directions, (2,)).basis
    (found,) = _scores.score(context, base, Pool([Place(2)], {-1: directions}))
    loaded = context.engine.loaded
    with preview_edit(loaded, context.plan, basis):
        bypass = mean_log_odds(context, [(11,)])
    with hooked(loaded.model, {"model.layers.1": lambda h: h + direction.float()}):
        induced = mean_log_odds(context, [(11,)])
    assert found.bypass == pytest.approx(bypass)
    assert found.induce == pytest.approx(induced - base.contrast_score)
    assert found.kl > 0


class Picky:
    """Scores no answer to the first prompt, and takes all others."""

    identity = RuleJudge().identity

    def judge_all(self, answers):
        said = [Judgement(1.0, 0.5, False)] * len(answers)
        return [Judgement(None, None, None), *said[1:]]


def test_the_judge_that_is_given_judges_and_what_it_cannot_score_is_not_0(context):
    (judged,) = judge_edits(replace(context, judge=Picky()), [random_basis(32, 1, seed=0)])
    assert judged.products == [None] + [0.5] * (len(PROMPTS) - 1)
    assert judged.mean_product == 0.5
    assert judged.summary.product is None  # a third of the answers has no verdict
    many = replace(
        judged,
        answers=(*judged.answers, *judged.answers[1:] * 49),
        verdicts=(*judged.verdicts, *judged.verdicts[1:] * 49),
    )
    assert many.products.count(None) == 1  # of 101
    n = len(many.verdicts) - 1
    assert many.summary.product == Estimate(value=0.5, low=None, high=None, n=n, asked=n + 1)
    gain = _grow._gain(judged, judged, 0)
    assert (gain.value, gain.n) == (0.0, len(PROMPTS) - 1)
    silent = tuple(v.model_copy(update={"compliance": None}) for v in judged.verdicts)
    nothing = replace(judged, verdicts=silent)
    assert _grow._gain(judged, nothing, 0) is None


def test_no_edit_no_kl_and_no_hook_stays(context, base):
    assert _scores.mean_kl(unedited(context), base) == [pytest.approx(0, abs=1e-9)]
    with removed(context, [random_basis(32, 2, seed=0)]) as edited:
        assert _scores.mean_kl(edited, base)[0] > 1e-4
    assert _scores.mean_kl(unedited(context), base) == [pytest.approx(0, abs=1e-9)]


def test_rows_under_edits_of_their_own_equal_one_edit_at_a_time(context, base):
    """Ranks, layers and prompts mixed in one batch; batches cut edits apart."""
    bases = [random_basis(32, k, seed=k) for k in (1, 3, 2)] + [torch.zeros(32, 1).double()]
    with removed(context, bases) as edited:
        refusal, kl = (
            _scores.mean_log_odds(edited, context.target, [(11, 12), (20,)]),
            _scores.mean_kl(edited, base),
        )
        answers = edited.answers(PROMPTS, max_new_tokens=4, batch_size=4)
    plain = unedited(context)
    for i, basis in enumerate(bases):
        with preview_edit(context.engine.loaded, context.plan, basis):
            assert refusal[i] == pytest.approx(mean_log_odds(context, [(11, 12), (20,)]))
            assert kl[i] == pytest.approx(_scores.mean_kl(plain, base)[0], abs=1e-6)
            assert answers[i] == plain.answers(PROMPTS, max_new_tokens=4, batch_size=4)[0]
    assert kl[3] == pytest.approx(0, abs=1e-7)  # nothing removed, but in a batch with others
    assert len(set(refusal)) == 4


def test_directions_added_side_by_side_equal_one_at_a_time(context):
    layers, directions = [1, 3, 1], list(torch.randn(3, 32, dtype=torch.float64))
    with steered(context, layers, directions) as edited:
        together = _scores.mean_log_odds(edited, context.target, [(11,)])
    alone = []
    for layer, direction in zip(layers, directions, strict=True):
        with steered(context, [layer], [direction]) as edited:
            alone += _scores.mean_log_odds(edited, context.target, [(11,)])
    assert together == pytest.approx(alone)
    assert together != pytest.approx([mean_log_odds(context, [(11,)])] * 3)


def test_thinking_is_named_where_the_base_gives_nothing_to_go_by():
    plain = Answer("Sure!", (5,), "stop")
    thinks = Answer("<think>Hm.</think>Sure!", (5,), "stop", start=18)
    assert _scores._thinking_note(JudgedAnswers((plain, plain), ())) == ""
    note = _scores._thinking_note(JudgedAnswers((plain, thinks, thinks), ()))
    assert note.startswith(" 2 of its 3 replies begin with thinking")
    assert "enable_thinking: false" in note
