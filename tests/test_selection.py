"""Choosing layers and k: scores against oracles, gates, stacks, and the demo end to end."""

import hashlib
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from abliterator import pipeline, selection
from abliterator.bake import EditSettings, bake, plan_edits, preview_edit, preview_edits
from abliterator.card import render_card
from abliterator.checkpoint import Checkpoint
from abliterator.directions import Directions, Place, load_subspace, stack
from abliterator.errors import DirectionError, PromptError, RecipeError
from abliterator.generation import Answer, generate, stop_ids
from abliterator.judge import Judgement, RuleJudge
from abliterator.model import ByRow, block_paths, hooked, load_model, render_chat
from abliterator.pipeline import Options
from abliterator.pipeline._prompt_sets import PromptSets, set_apart
from abliterator.prompts import PromptSet
from abliterator.recipe import Selection, load_recipe
from abliterator.record import Estimate, Verdict
from abliterator.selection import (
    Asked,
    Candidate,
    Gates,
    Pool,
    Search,
    Subject,
    _grow,
    _race,
    _scores,
    _sweep,
    judge_edits,
    learn_openings,
    participation_ratio,
    refusal_scores,
)
from abliterator.selection._controls import Control
from abliterator.selection._rows import added, removed, unedited
from abliterator.subspace import random_basis
from abliterator.verification import verify
from tests.test_card import demo_record
from tests.test_pipeline import Log

ROOT = Path(__file__).parents[1]
FAST = Options(device="cpu", dtype="float32")


# ---- how refusals begin


def test_openings_are_what_refusals_have_and_answers_lack():
    refusals = [[1, 2, 3, 9], [1, 2, 3, 8], [1, 2, 4], [7, 7]]
    answers = [[1, 5], [1, 6], [1, 5]]
    # (1) alone opens answers too; (1, 2) opens three refusals, (7) the last one
    assert learn_openings(refusals, answers) == ((1, 2), (7,))


def test_refusals_that_begin_as_answers_do_have_no_opening():
    assert learn_openings([[1, 2], [3]], [[1, 2], [3]]) == ()
    assert learn_openings([[], []], [[1]]) == ()


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=12),
)
def test_no_opening_begins_another_so_none_is_counted_twice(refusals, answers):
    found = learn_openings(refusals, answers)
    for a in found:
        assert sum(b[: len(a)] == a for b in found) == 1


PROMPTS = [[4, 9, 17, 30], [5, 9, 31], [4, 8, 60, 61]]


def test_refusal_score_is_the_log_odds_of_the_openings(tiny_loaded):
    loaded, openings = tiny_loaded(), [(11, 12, 13), (20,)]
    found = refusal_scores(loaded, PROMPTS, openings, max_batch_tokens=64)
    for prompt, score in zip(PROMPTS, found.tolist(), strict=True):
        p = 0.0
        for opening in openings:
            with torch.no_grad():
                logits = loaded.model(torch.tensor([[*prompt, *opening]])).logits[0].double()
            at = logits.softmax(dim=1)
            p += math.prod(float(at[len(prompt) - 1 + i, token]) for i, token in enumerate(opening))
        assert score == pytest.approx(math.log(p / (1 - p)), abs=1e-4)


# ---- candidates


@pytest.fixture
def subject(tiny_loaded):
    loaded = tiny_loaded()
    from abliterator.anatomy import anatomy_of

    checkpoint = Checkpoint.open(loaded.folder)
    anatomy = anatomy_of(checkpoint.config)
    asked = Asked([f"prompt {i}" for i in range(len(PROMPTS))], PROMPTS)
    return Subject(
        loaded=loaded,
        plan=plan_edits(checkpoint, anatomy, EditSettings()),
        blocks=block_paths(anatomy.blocks, anatomy.n_layers),
        target=asked,
        contrast=asked,
        neutral=asked,
        held_out=asked,
        judge=RuleJudge(),
        max_new_tokens=4,
        batch_size=4,
        max_batch_tokens=64,
    )


@pytest.fixture
def base(subject):
    """A baseline of a model that has no refusals to learn from."""
    forced = [(3, 4, 5), (6,), ()]
    return _scores.Baseline(
        openings=((11,),),
        judged=judge_edits(subject, [torch.zeros(32, 1, dtype=torch.float64)])[0],
        target_score=0.0,
        contrast_score=float(
            refusal_scores(subject.loaded, PROMPTS, [(11,)], max_batch_tokens=64).mean()
        ),
        forced=forced,
        logprobs=[logprobs for *_, logprobs in sorted(unedited(subject).along(forced))],
        tokens=0,
    )


def test_scores_of_a_candidate(subject, base):
    """Under its edit the direction is gone; added, it moves the residual stream at its layer."""
    direction = torch.zeros(32, dtype=torch.float64)
    direction[3] = 5.0
    directions = Directions(direction.repeat(3, 1))
    basis = stack(directions, (2,)).basis
    (found,) = _scores.score(subject, base, Pool([Place(2)], {-1: directions}))
    with preview_edit(subject.loaded, subject.plan, basis):
        bypass = refusal_scores(subject.loaded, PROMPTS, [(11,)], max_batch_tokens=64).mean()
    with hooked(subject.loaded.model, {"model.layers.1": lambda h: h + direction.float()}):
        induced = refusal_scores(subject.loaded, PROMPTS, [(11,)], max_batch_tokens=64).mean()
    assert found.bypass == pytest.approx(float(bypass))
    assert found.induce == pytest.approx(float(induced) - base.contrast_score)
    assert found.kl > 0


class Picky:
    """Scores no answer to the first prompt, and takes all others."""

    identity = RuleJudge().identity

    def judge_all(self, answers):
        said = [Judgement(1.0, 0.5, False)] * len(answers)
        return [Judgement(None, None, None), *said[1:]]


def test_the_judge_that_is_given_judges_and_what_it_cannot_score_is_not_0(subject):
    (judged,) = judge_edits(replace(subject, judge=Picky()), [random_basis(32, 1, seed=0)])
    assert judged.products == [None] + [0.5] * (len(PROMPTS) - 1)
    assert judged.summary.product == Estimate(value=0.5, low=None, high=None, n=len(PROMPTS) - 1)
    gain = _grow._gain(judged, judged, 0)
    assert (gain.value, gain.n) == (0.0, len(PROMPTS) - 1)
    silent = tuple(v.model_copy(update={"compliance": None}) for v in judged.verdicts)
    nothing = replace(judged, verdicts=silent)
    assert _grow._gain(judged, nothing, 0) is None


def test_no_edit_no_kl_and_no_hook_stays(subject, base):
    assert _scores.mean_kl(unedited(subject), base) == [pytest.approx(0, abs=1e-9)]
    with removed(subject, [random_basis(32, 2, seed=0)]) as edited:
        assert _scores.mean_kl(edited, base)[0] > 1e-4
    assert _scores.mean_kl(unedited(subject), base) == [pytest.approx(0, abs=1e-9)]


def test_rows_under_edits_of_their_own_equal_one_edit_at_a_time(subject, base):
    """Ranks, layers and prompts mixed in one batch; batches cut edits apart."""
    bases = [random_basis(32, k, seed=k) for k in (1, 3, 2)] + [torch.zeros(32, 1).double()]
    with removed(subject, bases) as edited:
        refusal, kl = (
            edited.refusal(subject.target, [(11, 12), (20,)]),
            _scores.mean_kl(edited, base),
        )
        answers = edited.answers(PROMPTS, 4)
    plain = unedited(subject)
    for i, basis in enumerate(bases):
        with preview_edit(subject.loaded, subject.plan, basis):
            assert refusal[i] == pytest.approx(plain.refusal(subject.target, [(11, 12), (20,)])[0])
            assert kl[i] == pytest.approx(_scores.mean_kl(plain, base)[0], abs=1e-6)
            assert answers[i] == plain.answers(PROMPTS, 4)[0]
    assert kl[3] == pytest.approx(0, abs=1e-7)  # nothing removed, but in a batch with others
    assert len(set(refusal)) == 4


def test_directions_added_side_by_side_equal_one_at_a_time(subject):
    layers, directions = [1, 3, 1], list(torch.randn(3, 32, dtype=torch.float64))
    with added(subject, layers, directions) as steered:
        together = steered.refusal(subject.target, [(11,)])
    alone = []
    for layer, direction in zip(layers, directions, strict=True):
        with added(subject, [layer], [direction]) as steered:
            alone += steered.refusal(subject.target, [(11,)])
    assert together == pytest.approx(alone)
    assert together != pytest.approx(unedited(subject).refusal(subject.target, [(11,)]) * 3)


def candidate(layer, bypass=0.0, kl=0.05, induce=1.0):
    return Candidate(layer=layer, bypass=bypass, kl=kl, induce=induce)


def said(products):
    """Judged answers with these products."""
    return _scores.Judged(
        tuple(Answer("", (1,) * 7, "stop") for _ in products),
        tuple(
            Verdict(
                set="target",
                side="edited",
                index=i,
                compliance=product,
                coherence=1.0,
                refused=product == 0,
                truncated=False,
                kind="complied" if product else "refused",
            )
            for i, product in enumerate(products)
        ),
    )


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(scores, products)`: what a sweep sees of layers 1, 2, ... and of stacks by rank."""

    def script(scores, products):
        def judge(subject, bases, prompts=None):
            # the layer's direction is the unit vector of its index
            found = [
                products(tuple((basis.abs().argmax(dim=0) + 1).tolist()), basis.shape[1])
                for basis in bases
            ]
            return [said(one if prompts is None else [one[i] for i in prompts]) for one in found]

        for room in (_race, _grow):
            monkeypatch.setattr(room, "judge_edits", judge)
        monkeypatch.setattr(_sweep, "score", lambda *_: scores)
        monkeypatch.setattr(_grow, "mean_kl", lambda edited, _: [0.01] * edited.n)

    return script


UNIT = Directions(torch.eye(32, dtype=torch.float64))


def pool(*layers):
    return Pool([Place(layer) for layer in layers], {-1: UNIT})


def ask(subject, n):
    """The subject with so many held-out prompts."""
    return replace(subject, held_out=Asked([str(i) for i in range(n)], [[4]] * n))


def sweep(subject, n, gates=Gates(), n_judged=2, prompts=2, schedule=None):  # noqa: B008
    search = Search(gates=gates, survivors=n_judged)
    return _sweep.sweep_places(
        ask(subject, prompts),
        None,
        pool(*range(1, n + 1)),
        replace(search, schedule=schedule) if schedule else search,
        least=1,
        stackable=1,
        on_step=lambda _: None,
    )


def test_answers_decide_among_the_survivors_and_gates_come_first(subject, scripted):
    scores = [
        candidate(1, bypass=-9, kl=0.5),  # the best bypass, but it moves everything
        candidate(2, bypass=-3),
        candidate(3, bypass=-2),
        candidate(4, bypass=-1),
        candidate(5, bypass=-5, induce=-1),
    ]
    scripted(scores, lambda layers, k: [1.0, 1.0] if layers == (3,) else [0.5, 0.0])
    found = sweep(subject, 5)
    assert [c.layer for c in found] == [3, 2, 4, 1, 5]
    assert [c.stopped_by for c in found[3:]] == [("max_kl",), ("min_induce",)]
    assert [c.answers is not None for c in found] == [True, True, False, False, False]


def test_ties_go_to_the_lower_kl(subject, scripted):
    scores = [candidate(1, bypass=-2, kl=0.09), candidate(2, bypass=-1, kl=0.01)]
    scripted(scores, lambda layers, k: [1.0, 0.5])
    assert [c.layer for c in sweep(subject, 2)] == [2, 1]


def test_most_candidates_answer_few_prompts(subject, scripted):
    """8 candidates on 4 prompts, 4 on 8, 2 on 16; an answer is asked for once."""
    asked = []

    def products(layers, k):
        asked.append(layers)
        (layer,) = layers
        return [1.0 if layer > i % 8 else 0.0 for i in range(16)]

    scripted([candidate(i, bypass=-i) for i in range(1, 9)], products)
    schedule = Selection(rungs=(4, 8)).schedule
    found = sweep(subject, 8, n_judged=8, prompts=16, schedule=schedule)
    assert [c.layer for c in found[:2]] == [8, 7]
    assert [len(c.rungs) for c in found] == [3, 3, 2, 2, 1, 1, 1, 1]
    assert [r.prompts for r in found[0].rungs] == [4, 8, 16]
    assert [c.answers.product.n for c in found] == [16, 16, 8, 8, 4, 4, 4, 4]
    assert sum(c.answers.tokens for c in found) == 7 * (4 * 8 + 4 * 4 + 8 * 2)
    assert found[0].answers.product.value == 1.0


def test_who_dropped_out_comes_back_where_the_leader_was_lucky(subject, scripted):
    """Candidate 2 answers only the prompts of the first rung; 1 is second there, 3 last."""
    lucky = random.Random(0).sample(range(16), 16)[:4]

    def products(layers, k):
        (layer,) = layers
        steady = [1.0 if i in lucky[1:] or i not in lucky else 0.0 for i in range(16)]
        return {1: steady, 2: [float(i in lucky) for i in range(16)], 3: [0.0] * 16}[layer]

    scripted([candidate(i) for i in (1, 2, 3)], products)
    schedule = Selection(rungs=(4,), keep=0.3).schedule
    found = sweep(subject, 3, n_judged=3, prompts=16, schedule=schedule)
    assert [c.layer for c in found] == [1, 2, 3]
    assert [c.answers.product.n for c in found] == [16, 16, 4]
    assert [r.prompts for r in found[0].rungs] == [4, 16]
    assert sum(c.answers.tokens for c in found) == 7 * (16 + 16 + 4)


@given(
    st.lists(st.integers(1, 40), max_size=4, unique=True).map(sorted),
    st.floats(0.05, 1),
    st.integers(1, 30),
    st.integers(1, 32),
    st.integers(1, 5),
)
def test_a_schedule_ends_with_all_prompts_and_at_least_those_that_are_stacked(
    rungs, keep, candidates, prompts, least
):
    found = Selection(rungs=tuple(rungs), keep=keep).schedule(candidates, prompts, least)
    assert found[0][0] == candidates
    assert found[-1][1] == prompts
    assert found[-1][0] >= min(candidates, least)
    for (n, few), (fewer, more) in itertools.pairwise(found):
        assert n >= fewer >= 1
        assert few < more


@given(
    st.lists(
        st.tuples(st.floats(0.11, 5), st.floats(-5, 5, allow_subnormal=False)),
        min_size=1,
        max_size=5,
    )
)
def test_what_the_nearest_is_said_to_need_is_enough(found):
    import re

    gates = Gates()
    tried = [candidate(i + 1, kl=kl, induce=induce) for i, (kl, induce) in enumerate(found)]
    tried = [c.model_copy(update={"stopped_by": _sweep.stopped_by(c, gates)}) for c in tried]
    text = _sweep.none_passed(tried, gates)
    named = int(re.search(r"nearest is layer (\d+)", text)[1])
    values = dict(re.findall(r"selection\.(\w+)=(\S+)", text.replace(". Lower", " Lower")))
    moved = Gates(**{"max_kl": 0.1, "min_induce": 0.0} | {k: float(v) for k, v in values.items()})
    assert _sweep.stopped_by(tried[named - 1], moved) == ()
    for c in tried:
        assert all(re.search(rf"`{gate}`.*\b{c.layer} \(", text) for gate in c.stopped_by)


def test_fewer_survivors_than_k():
    passing = [candidate(1), candidate(2).model_copy(update={"stopped_by": ("max_kl",)})]
    _sweep.require_enough(passing, 1)
    with pytest.raises(DirectionError, match="only 1 of 2 candidate layers"):
        _sweep.require_enough(passing, 2)


# ---- stacks


def grow(subject, layers=(1, 2, 3, 4, 5), **more):
    among = replace(pool(*layers), **more)
    tried, why = _grow.grow_stack(
        subject, None, among, among.places, (1, 2, 3, 5), search=Search(), on_step=lambda _: None
    )
    return [s.k for s in tried], _grow.taken(tried, Gates()), why


def by_rank(scores, random=0.0):
    """Products of 20 prompts: the share that stacks of layers 1 .. k reach; of others, `random`."""

    def products(layers, k):
        share = scores[k] if layers == tuple(range(1, k + 1)) else random
        return [1.0] * round(20 * share) + [0.0] * (20 - round(20 * share))

    return products


def test_a_stack_grows_while_it_is_better(subject, scripted):
    scripted([], by_rank({1: 0.2, 2: 0.6, 3: 0.65, 5: 1.0}))
    tried, k, why = grow(subject)
    assert (tried, k) == ([1, 2, 3], 2)  # one prompt of 20 more is no evidence
    assert "3 directions are not better than the smaller stack: product +0.050 [+0.000" in why


def test_a_stack_that_random_directions_equal_is_not_taken(subject, scripted):
    scripted([], by_rank({1: 0.2, 2: 0.9}, random=0.9))
    assert grow(subject)[:2] == ([1], 1)


@pytest.mark.parametrize(("random_kl", "counts"), [(0.3, False), (0.1, True), (0.01, True)])
def test_a_control_that_breaks_the_model_does_not_count(
    subject, scripted, monkeypatch, random_kl, counts
):
    scripted([], by_rank({1: 0.2, 2: 0.9}, random=0.9))
    monkeypatch.setattr(_grow, "mean_kl", lambda *_: [0.05, *[random_kl] * 3])
    tried, k, why = grow(subject, layers=(1, 2))
    assert (tried, k) == (([1], 1) if counts else ([1, 2], 2))
    assert ("did not count: random at k = 1, 2)" in why) != counts


def test_a_stack_may_move_as_much_as_its_controls(subject, scripted, monkeypatch):
    """Above the gate, but not above the stack itself, which layers named in a recipe may be."""
    scripted([], by_rank({1: 0.2, 2: 0.9}, random=0.9))
    monkeypatch.setattr(_grow, "mean_kl", lambda *_: [0.4, 0.2, 0.3, 0.4])
    assert grow(subject, layers=(1, 2))[:2] == ([1], 1)


def test_one_lucky_draw_of_a_control_is_not_the_control(subject, scripted, monkeypatch):
    """Of three draws one does all that the stack does: on the mean, a third of the prompts."""
    scripted([], by_rank({1: 0.9, 2: 0.9}))
    whole, lucky = _grow.judge_edits, iter([1.0, 0.0, 0.0] * 2)

    def judge(subject, bases):
        stack, *controls = whole(subject, bases)
        return [stack, *(said([next(lucky)] * 20) for _ in controls)]

    monkeypatch.setattr(_grow, "judge_edits", judge)
    among = pool(1)
    (tried,), _ = _grow.grow_stack(
        subject, None, among, among.places, (1,), search=Search(), on_step=lambda _: None
    )
    assert tried.draws == 3
    assert (tried.random.product.value, tried.random.product.n) == (pytest.approx(1 / 3), 20)
    assert tried.random.product.low is None  # every prompt is worth the same
    assert tried.random.refusal.value == pytest.approx(2 / 3)
    assert tried.random.tokens == 3 * 20 * 7
    assert tried.over_random.value == pytest.approx(0.9 - 1 / 3)
    assert tried.random_kl == pytest.approx(0.01)


def test_what_a_judge_cannot_tell_of_one_draw_counts_by_the_others():
    unsaid = said([1.0, 0.0])
    silent = {"compliance": None, "coherence": None, "refused": None, "kind": None}
    unsaid = replace(
        unsaid, verdicts=(unsaid.verdicts[0].model_copy(update=silent), unsaid.verdicts[1])
    )
    control = Control((said([1.0, 1.0]), unsaid, unsaid), kl=0.0)
    assert control.products == [1.0, pytest.approx(1 / 3)]
    assert Control((unsaid, unsaid), kl=0.0).products == [None, 0.0]
    assert Control((unsaid, unsaid), kl=0.0).summary.product.n == 1


def test_shuffles_are_drawn_apart_and_no_more_than_there_are():
    turned = [{-1: Directions(UNIT.vectors.roll(-8 * i, dims=0))} for i in (1, 2, 3)]
    layers = replace(pool(1, 2), shuffled=turned)
    first, second = layers.shuffled_stacks(layers.places, 2, draws=2)
    assert [first.abs().argmax(dim=0).tolist(), second.abs().argmax(dim=0).tolist()] == [
        [8, 9],
        [16, 17],
    ]
    within = replace(layers, differences={-1: torch.randn(6, 32, 32)})
    (one,) = within.shuffled_stacks(within.places, 2, draws=3)  # three shuffles make one pair
    assert one.abs().argmax(dim=0).tolist() == [8, 16]
    assert len(within.shuffled_stacks(within.places, 1, draws=3)) == 3


def test_all_sizes_that_there_are_layers_for(subject, scripted):
    scripted([], by_rank({1: 0.2, 2: 0.6, 3: 1.0}))
    tried, k, why = grow(subject, layers=(1, 2, 3, 4))
    assert (tried, k) == ([1, 2, 3], 3)
    assert "4 layers" in why


def test_a_larger_stack_must_pass_the_kl_gate(subject, scripted, monkeypatch):
    scripted([], by_rank({1: 0.2, 2: 1.0}))
    monkeypatch.setattr(_grow, "mean_kl", lambda edited, _: [0.3] * edited.n)
    tried, k, why = grow(subject)
    assert (tried, k) == ([1, 2], 1)
    assert "too far (KL 0.3 nats)" in why


def test_a_stack_that_shuffled_labels_equal_is_not_taken(subject, scripted):
    """The control's directions are those of layers 1, 2, ...: as good as the stack's own."""
    turned = Directions(UNIT.vectors.roll(-8, dims=0))

    def products(layers, k):
        return [1.0] * 20 if layers[0] in (1, 9) else [0.0] * 20

    scripted([], products)
    tried, k, why = grow(subject, shuffled=[{-1: turned}])
    assert (tried, k) == ([1], 1)
    assert "not better than those of shuffled labels: product +0.000" in why


def test_a_stack_within_a_layer(subject, scripted):
    """Its first direction is the layer's, and its size is not bound by the number of layers."""
    pairs = torch.zeros(6, 3, 32)
    for i, length in enumerate((3, 2, 1)):  # pairs differ along three more directions
        pairs[2 * i, 0, 10 + i], pairs[2 * i + 1, 0, 10 + i] = length, -length
    pairs[:, 0, 0] = 1.0
    scripted(
        [], lambda layers, k: [1.0] * (k * 5) + [0.0] * (20 - k * 5) if 1 in layers else [0.0] * 20
    )
    tried, k, why = grow(subject, layers=(1,), differences={-1: pairs})
    assert (tried, k) == ([1, 2, 3], 3)
    assert why == "there is no larger stack to try with 4 directions of one layer"
    with pytest.raises(DirectionError, match="along 4 directions at layer 1, and k is 5"):
        replace(pool(1), differences={-1: pairs}).stack([Place(1)], 5)
    found = replace(pool(1), differences={-1: pairs}).stack([Place(1)], 3)
    assert found.layers == (1,)
    assert found.basis.abs().argmax(dim=0).tolist() == [0, 10, 11]


def test_given_layers_keep_their_order_and_only_k_is_chosen(subject, base, scripted, monkeypatch):
    scripted([], lambda layers, k: [1.0] * 20 if layers == (3,) else [0.0] * 20)
    base = replace(base, tokens=0)
    monkeypatch.setattr(selection, "measure_base", lambda _: base)
    found = selection.choose(subject, pool(3, 1), sweep=False, k=(1, 2), search=Search())
    assert (found.layers, found.k) == ((3, 1), 1)
    assert found.candidates == ()
    assert [s.layers for s in found.stacks] == [(3,), (3, 1)]
    # two stacks, three controls of each, and a base that cost nothing
    assert found.rollout_tokens == 8 * 20 * 7
    assert found.structure.participation_ratio == pytest.approx(2)
    card = render_card(
        demo_record().model_copy(update={"selection": found.model_dump(mode="json")})
    )
    assert "| 2 | 0.010 | 0.000 | 1.000 | 0.000 | -1.000 | 0.000 at KL 0.010 |  | 20 |" in card


# ---- structure


def test_participation_ratio_counts_directions():
    eye = torch.eye(6, dtype=torch.float64)
    assert participation_ratio(eye[:4]) == pytest.approx(4)
    assert participation_ratio(eye[[0, 0, 0]] * torch.tensor([[1.0], [2.0], [-3.0]])) == (
        pytest.approx(1)
    )
    two = torch.stack([eye[0], eye[0] + eye[1]])  # 45 degrees: eigenvalues 1 +- cos
    assert participation_ratio(two) == pytest.approx(4 / (2 + 2 * 0.5))


def test_pictures_are_the_same_twice_and_take_missing_values(tmp_path):
    pytest.importorskip("matplotlib")
    from abliterator.plots import draw_cosines, draw_curves

    for name in "ab":
        draw_cosines(tmp_path / f"{name}.png", [[1.0, 0.5], [0.5, 1.0]], [4, 7])
        curves = {"KL, nats": [0.1, 0.2], "compliance": [None, 0.5], "coherence": [None, None]}
        draw_curves(tmp_path / f"{name}2.png", [(4, -1), (7, -1)], curves, chosen=[7])
        draw_curves(tmp_path / f"{name}3.png", [(4, -1), (4, -2)], curves)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a2.png").read_bytes() == (tmp_path / "b2.png").read_bytes()


# ---- which prompts


def prompt_set(name, n):
    return PromptSet(name=name, prompts=tuple(f"{name} {i}" for i in range(n)), source=name)


@pytest.mark.parametrize("own_contrast", [False, True])
def test_selection_takes_prompts_that_nothing_else_uses(own_contrast):
    from abliterator.recipe import Prompts, Source

    recipe = Prompts(
        target=Source(path="t.txt"), contrast=Source(path="c.txt") if own_contrast else None
    )
    sets = PromptSets(
        {"target": prompt_set("target", 100), "contrast": prompt_set("contrast", 40)},
        {"target": prompt_set("evaluation", 9), "neutral": prompt_set("neutral", 40)},
    )
    found = set_apart(sets, recipe, prompts=16, seed=0)
    assert found.evaluation["target"].prompts == sets.evaluation["target"].prompts
    assert len(found.selection["target"].prompts) == 16
    assert len(found.selection["neutral"].prompts) == (16 if own_contrast else 10)
    parts = [
        s.prompts for p in (found.extraction, found.evaluation, found.selection) for s in p.values()
    ]
    everything = [prompt for prompts in parts for prompt in prompts]
    assert len(everything) == len(set(everything)) == 189
    assert PromptSets.from_json(json.loads(json.dumps(found.to_json()))) == found


# ---- the stage


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """A recipe with a sweep on a tiny random model, which refuses nothing."""
    (tmp_path / "t.txt").write_text("\n".join(f"Where is the {x}?" for x in "abcdefgh"))
    (tmp_path / "n.txt").write_text("\n".join(f"What is the {x}?" for x in "abcdefgh"))
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {tiny_folder()}\nlayers: sweep\nk: auto\n"
        "prompts: {target: {path: t.txt}, neutral: {path: n.txt}}\n"
        "selection: {tokens: 3}\n"
    )
    return lambda *overrides: load_recipe(path, overrides=overrides)


def test_a_base_that_does_not_refuse(recipe, tmp_path):
    with pytest.raises(PromptError, match=r"refuses 0 of 2 held-out .* nothing to remove"):
        pipeline.build(recipe(), tmp_path / "out", options=FAST)
    assert not (tmp_path / "out" / "checkpoint").exists()
    log = Log()
    pipeline.run_stages(recipe(), tmp_path / "out", until="capture", options=FAST, progress=log)
    assert log.skipped == ["prompts", "capture"]  # what was captured is not lost


def test_the_plan_tells_what_a_selection_costs(recipe, tmp_path):
    summary = pipeline.plan_recipe(recipe("selection.prompts=10"), tmp_path / "out").summary()
    assert summary["layers"] == [1, 2]  # of three, less the last fifth
    assert summary["selection"] == {
        "candidates": 2,
        "every_position": 0,
        "judged": 2,
        "stacks": 2,
        "prompts": 10,
        "answers": 16 + 10 * (1 + 2 * 7) + 8 * 2 + 2,  # two on 8 prompts, one on 2 more
        "tokens": (16 + 10 * (1 + 2 * 7) + 8 * 2 + 2) * 3,
    }
    assert (
        pipeline.plan_recipe(recipe("layers=[1]", "k=1"), tmp_path).summary()["selection"] is None
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("edit.norm=column", "no run-time form"),
        ("k=3", "only 2 candidate layers of 3"),
        ("selection.stacks=[2, 3]", "begin with 1"),
        ("selection.max_kl=0", "selection.max_kl"),
    ],
)
def test_a_selection_that_cannot_be_made(recipe, tmp_path, override, says):
    with pytest.raises(RecipeError, match=says):
        pipeline.plan_recipe(recipe(override), tmp_path / "out")


def test_the_command_needs_something_to_choose(recipe, tmp_path):
    from click.testing import CliRunner

    from abliterator.cli import main

    recipe()
    args = ["sweep", str(tmp_path / "tiny.yaml"), "--set", "layers=[1]", "--set", "k=1"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 1
    assert "nothing to choose" in done.stderr


# ---- the demo: one direction, learned, that sweep and k: auto must find


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    settings = ["layers=sweep", "k=auto", "selection.skip_last=0", "benchmarks.tasks=[]"]
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", overrides=settings)

    def run(name, until):
        out = tmp_path_factory.mktemp("demo") / name
        pipeline.run_stages(recipe, out, until=until, options=FAST)
        return out

    return run("first", "card"), run("second", "selection")


@pytest.mark.slow
def test_the_demo_needs_one_direction(demo):
    found = json.loads((demo[0] / "work" / "sweep.json").read_text())
    assert found["k"] == 1
    assert found["structure"]["verdict"] == "single direction"
    (one, *_) = found["stacks"]
    assert one["answers"]["product"]["value"] >= 0.9
    base = found["base"]["answers"]["refusal"]["value"]
    for tried in found["stacks"]:  # as many directions that know nothing remove nothing
        for control in ("random", "shuffled"):
            assert base - tried[control]["refusal"]["value"] <= 0.1
    assert len(found["structure"]["cosines"]) == 7
    record = pipeline.read_record(demo[0])
    assert record.selection == found
    assert record.edit.layers == tuple(found["layers"][:1])
    assert record.behaviour["target"].edited.refusal.value <= 0.1
    card = (demo[0] / "checkpoint" / "README.md").read_text()
    assert "chosen by a sweep over 7 layers" in card
    assert "(abliterator/cosines.png)" in card
    assert "(abliterator/sweep.png)" in card
    base = ROOT / "abliterator" / "data" / "demo" / "model"
    proof = verify(base, demo[0] / "checkpoint")
    assert proof.faults == proof.foreign == ()
    for name, digest in record.pictures.items():
        drawn = demo[0] / "work" / "plots" / Path(name).name
        assert proof.sha256[name] == digest == hashlib.sha256(drawn.read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_same_recipe_chooses_the_same(demo):
    names = ["work/sweep.json", "work/plots/sweep.png", "work/plots/cosines.png"]
    first, second = ({n: (out / n).read_bytes() for n in names} for out in demo)
    assert first == second


@pytest.mark.slow
def test_what_was_judged_by_hooks_is_what_was_baked(demo, tmp_path):
    """Greedy answers under the preview and of baked files, on all held-out prompts.

    Of a float32 copy: storing in bfloat16 rounds, and may tip one greedy answer in some dozens.
    """
    prompts = json.loads((demo[0] / "work" / "prompts.json").read_text())["selection"]["target"]
    from abliterator.anatomy import anatomy_of

    stored = ROOT / "abliterator" / "data" / "demo" / "model"
    shutil.copytree(stored, tmp_path / "wide")
    wide = {n: t.float() for n, t in load_file(stored / "model.safetensors").items()}
    save_file(wide, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path / "wide")
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), EditSettings())
    basis = load_subspace(demo[0] / "work" / "directions.safetensors").basis

    def answered(folder):
        loaded = load_model(folder, device="cpu", dtype="float32")
        ids = [render_chat(loaded.tokenizer, p) for p in prompts["prompts"]]

        def texts():
            stop = stop_ids(loaded)
            found = generate(loaded, ids, max_new_tokens=48, batch_size=32, stop_ids=stop)
            return [a.text for a in found]

        return loaded, texts

    loaded, texts = answered(checkpoint.folder)
    plain = texts()
    with preview_edit(loaded, plan, basis):
        previewed = texts()
    # as the sweep does it: half of the rows under another edit
    n = len(prompts["prompts"])
    ids = [render_chat(loaded.tokenizer, p) for p in prompts["prompts"]]
    with preview_edits(loaded, plan, [random_basis(len(basis), 2, seed=0), basis]) as choose:
        both = generate(
            loaded,
            ids * 2,
            max_new_tokens=48,
            batch_size=64,
            stop_ids=stop_ids(loaded),
            share_prefix=True,
            by_row=ByRow([i // n for i in range(2 * n)], choose),
        )
    bake(checkpoint, plan, basis, tmp_path / "baked")
    baked = answered(tmp_path / "baked")[1]()
    assert previewed == baked
    assert [a.text for a in both[n:]] == baked
    assert [a.text for a in both[:n]] != baked
    assert previewed != plain


# ---- a model whose refusals need more than one direction


@pytest.mark.slow
def test_several_mechanisms_need_several_directions(tmp_path):
    """Three topics, declined in three wordings, taught one after the other (trained here)."""
    script = ROOT / "recipes" / "demo" / "make_several.py"
    subprocess.run([sys.executable, script, "--out", tmp_path / "several"], check=True)
    recipe = load_recipe(tmp_path / "several" / "several.yaml")
    out = tmp_path / "out"
    pipeline.run_stages(recipe, out, until="selection", options=FAST)
    found = json.loads((out / "work" / "sweep.json").read_text())
    assert found["base"]["answers"]["refusal"]["value"] >= 0.8
    assert found["k"] > 1
    assert found["structure"]["verdict"] == "low-rank subspace"
    (taken,) = (s["answers"] for s in found["stacks"] if s["k"] == found["k"])
    single = [c["answers"] for c in found["candidates"] if c["answers"] and len(c["rungs"]) > 1]
    single.append(found["stacks"][0]["answers"])
    left = min(answers["refusal"]["value"] for answers in single)
    assert left - taken["refusal"]["value"] >= 0.2
    assert taken["coherence"]["value"] >= 0.95
