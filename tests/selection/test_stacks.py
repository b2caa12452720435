"""How many directions: stacks against smaller ones and controls."""

from dataclasses import replace

import pytest
import torch

from abliterator import recipe, selection
from abliterator.card import render_card
from abliterator.directions import Directions, Place
from abliterator.errors import DirectionError
from abliterator.record import Selection
from abliterator.selection import _grow
from abliterator.selection._grow import Control
from tests.card.records import demo_record
from tests.selection.scripted import UNIT, pool, said


def grow(context, layers=(1, 2, 3, 4, 5), **more):
    among = replace(pool(*layers), **more)
    tried, why = _grow.grow_stack(
        context,
        None,
        among,
        among.places,
        (1, 2, 3, 5),
        settings=recipe.Selection(),
        on_step=lambda _: None,
    )
    return [s.k for s in tried], _grow.largest_better(tried, recipe.Selection()), why


def by_rank(scores, random=0.0):
    """Products of 20 prompts: the share that stacks of layers 1 .. k reach; of others, `random`."""

    def products(layers, k):
        share = scores[k] if layers == tuple(range(1, k + 1)) else random
        return [1.0] * round(20 * share) + [0.0] * (20 - round(20 * share))

    return products


def test_a_stack_grows_while_it_is_better(context, scripted):
    scripted([], by_rank({1: 0.2, 2: 0.6, 3: 0.65, 5: 1.0}))
    tried, k, why = grow(context)
    assert (tried, k) == ([1, 2, 3], 2)  # one prompt of 20 more is no evidence
    assert "3 directions are not better than the smaller stack: product +0.050 [+0.000" in why


def test_a_stack_that_random_directions_equal_is_not_taken(context, scripted):
    scripted([], by_rank({1: 0.2, 2: 0.9}, random=0.9))
    assert grow(context)[:2] == ([1], 1)


@pytest.mark.parametrize(("random_kl", "counts"), [(0.3, False), (0.1, True), (0.01, True)])
def test_a_control_that_breaks_the_model_does_not_count(
    context, scripted, monkeypatch, random_kl, counts
):
    scripted([], by_rank({1: 0.2, 2: 0.9}, random=0.9))
    monkeypatch.setattr(_grow, "mean_kl", lambda *_: [0.05, *[random_kl] * 3])
    tried, k, why = grow(context, layers=(1, 2))
    assert (tried, k) == (([1], 1) if counts else ([1, 2], 2))
    assert ("did not count: random at k = 1, 2)" in why) != counts


def test_a_stack_may_move_as_much_as_its_controls(context, scripted, monkeypatch):
    """Above the gate, but not above the stack itself, which layers named in a recipe may be."""
    scripted([], by_rank({1: 0.2, 2: 0.9}, random=0.9))
    monkeypatch.setattr(_grow, "mean_kl", lambda *_: [0.4, 0.2, 0.3, 0.4])
    assert grow(context, layers=(1, 2))[:2] == ([1], 1)


def test_one_lucky_draw_of_a_control_is_not_the_control(context, scripted, monkeypatch):
    """Of three draws one does all that the stack does: on the mean, a third of the prompts."""
    scripted([], by_rank({1: 0.9, 2: 0.9}))
    whole, lucky = _grow.judge_edits, iter([1.0, 0.0, 0.0] * 2)

    def judge(context, bases):
        stack, *controls = whole(context, bases)
        return [stack, *(said([next(lucky)] * 20) for _ in controls)]

    monkeypatch.setattr(_grow, "judge_edits", judge)
    among = pool(1)
    (tried,), _ = _grow.grow_stack(
        context,
        None,
        among,
        among.places,
        (1,),
        settings=recipe.Selection(),
        on_step=lambda _: None,
    )
    assert tried.draws == 3
    assert (tried.random.product.value, tried.random.product.n) == (pytest.approx(1 / 3), 20)
    assert tried.random.product.low is None  # every prompt is worth the same
    assert tried.random.refusal.value == pytest.approx(2 / 3)
    assert tried.random.tokens == 3 * 20 * 7
    assert tried.over_random.value == pytest.approx(0.9 - 1 / 3)
    assert tried.random_kl == pytest.approx(0.01)


def test_what_a_judge_cannot_tell_of_one_draw_counts_by_the_others():
    silent = {"compliance": None, "coherence": None, "refused": None, "kind": None}

    def first_unsaid(products):
        judged = said(products)
        first, *others = judged.verdicts
        return replace(judged, verdicts=(first.model_copy(update=silent), *others))

    unsaid = first_unsaid([1.0, 0.0])
    control = Control((said([1.0, 1.0]), unsaid, unsaid), kl=0.0)
    assert control.products == [1.0, pytest.approx(1 / 3)]
    assert Control((unsaid, unsaid), kl=0.0).products == [None, 0.0]
    assert Control((unsaid, unsaid), kl=0.0).summary.product is None  # half have no verdict
    few = first_unsaid([1.0] * 100)
    assert Control((few, few), kl=0.0).summary.product.n == 99


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


def test_all_sizes_that_there_are_layers_for(context, scripted):
    scripted([], by_rank({1: 0.2, 2: 0.6, 3: 1.0}))
    tried, k, why = grow(context, layers=(1, 2, 3, 4))
    assert (tried, k) == ([1, 2, 3], 3)
    assert "4 layers" in why


def test_a_larger_stack_must_pass_the_kl_gate(context, scripted, monkeypatch):
    scripted([], by_rank({1: 0.2, 2: 1.0}))
    monkeypatch.setattr(_grow, "mean_kl", lambda edited, _: [0.3] * edited.n)
    tried, k, why = grow(context)
    assert (tried, k) == ([1, 2], 1)
    assert "too far (KL 0.3 nats)" in why


def test_a_stack_that_shuffled_labels_equal_is_not_taken(context, scripted):
    """The control's directions are those of layers 1, 2, ...: as good as the stack's own."""
    turned = Directions(UNIT.vectors.roll(-8, dims=0))

    def products(layers, k):
        return [1.0] * 20 if layers[0] in (1, 9) else [0.0] * 20

    scripted([], products)
    tried, k, why = grow(context, shuffled=[{-1: turned}])
    assert (tried, k) == ([1], 1)
    assert "not better than those of shuffled labels: product +0.000" in why


def test_a_stack_within_a_layer(context, scripted):
    """Its first direction is the layer's, and its size is not bound by the number of layers."""
    pairs = torch.zeros(6, 3, 32)
    for i, length in enumerate((3, 2, 1)):  # pairs differ along three more directions
        pairs[2 * i, 0, 10 + i], pairs[2 * i + 1, 0, 10 + i] = length, -length
    pairs[:, 0, 0] = 1.0
    scripted(
        [], lambda layers, k: [1.0] * (k * 5) + [0.0] * (20 - k * 5) if 1 in layers else [0.0] * 20
    )
    tried, k, why = grow(context, layers=(1,), differences={-1: pairs})
    assert (tried, k) == ([1, 2, 3], 3)
    assert why == "there is no larger stack to try with 4 directions of one layer"
    with pytest.raises(DirectionError, match="along 4 directions at layer 1, and k is 5"):
        replace(pool(1), differences={-1: pairs}).stack([Place(1)], 5)
    found = replace(pool(1), differences={-1: pairs}).stack([Place(1)], 3)
    assert found.layers == (1,)
    assert found.basis.abs().argmax(dim=0).tolist() == [0, 10, 11]


def test_given_layers_keep_their_order_and_only_k_is_chosen(context, base, scripted, monkeypatch):
    scripted([], lambda layers, k: [1.0] * 20 if layers == (3,) else [0.0] * 20)
    base = replace(base, tokens=0)
    monkeypatch.setattr(selection, "measure_base", lambda *_: base)
    found = selection.choose(
        context, base.scoring, pool(3, 1), sweep=False, k=(1, 2), settings=recipe.Selection()
    )
    assert (found.layers, found.k) == ((3, 1), 1)
    assert found.candidates == ()
    assert [s.layers for s in found.stacks] == [(3,), (3, 1)]
    # two stacks, three controls of each, and a base that cost nothing
    assert found.rollout_tokens == 8 * 20 * 7
    assert found.structure.participation_ratio == pytest.approx(2)
    assert Selection.model_validate_json(found.model_dump_json()) == found
    card = render_card(demo_record().model_copy(update={"selection": found}))
    assert (
        "| 2 | 0.010 | 0.000 | 1.000 | 0.000 | -1.000 | 0.000 at KL 0.010 |  | 20 of 20 |" in card
    )
