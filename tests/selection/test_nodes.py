"""Nodes of a self-organising map as candidates: raced, stacked, recorded."""

from dataclasses import replace

import pytest
import torch

from abliterator import recipe, selection
from abliterator.directions import Directions, Node, Place, nodes_of
from abliterator.errors import DirectionError
from abliterator.record import Candidate, Selection
from abliterator.selection import Pool, _scores
from tests.selection.scripted import UNIT, candidate

LAYER = 7
AT = Place(LAYER, -1)


def node_pool(n=4, **more):
    """Node i has the unit vector of index i; the layer's own direction is another."""
    nodes = {AT: torch.eye(32, dtype=torch.float64)[:n]}
    return Pool([Node(*AT, i) for i in range(n)], {-1: UNIT}, nodes=nodes, **more)


def choose(context, base, monkeypatch, pool, sizes=(1, 2, 3), **settings):
    base = replace(base, tokens=0)
    monkeypatch.setattr(selection, "measure_base", lambda *_: base)
    return selection.choose(
        context,
        base.scoring,
        pool,
        sweep=True,
        k=sizes,
        settings=recipe.Selection(rungs=(), survivors=4, **settings),
    )


def of_node(i, **scores):
    return candidate(LAYER, **scores).model_copy(update={"node": i})


def test_nodes_are_raced_and_the_best_are_stacked(context, base, scripted, monkeypatch):
    """Node 2 alone is best, with node 0 better still, and a third adds nothing."""
    share = {(3,): 0.6, (1,): 0.4, (3, 1): 1.0, (3, 1, 2): 1.0}

    def products(indices, k):
        return [1.0] * round(20 * share.get(indices, 0.0)) + [0.0] * (
            20 - round(20 * share.get(indices, 0.0))
        )

    scripted([of_node(i, bypass=-i) for i in range(4)], products)
    found = choose(context, base, monkeypatch, node_pool())
    assert found.nodes[:2] == (2, 0)
    assert set(found.layers) == {LAYER}
    assert found.k == 2
    assert [s.nodes[: s.k] for s in found.stacks] == [(2,), (2, 0), found.nodes[:3]]
    assert [c.node for c in found.candidates][:2] == [2, 0]
    assert [c.name for c in found.candidates][:1] == ["7 node 2"]
    again = Selection.model_validate_json(found.model_dump_json())
    assert again == found


def test_a_gate_stops_a_node(context, base, scripted, monkeypatch):
    scripted([of_node(0, kl=9.0), of_node(1)], lambda indices, k: [1.0] * 20)
    found = choose(context, base, monkeypatch, node_pool(2), sizes=(1,))
    assert found.nodes == (1,)
    assert found.candidates[-1].stopped_by == ("max_kl",)


def test_scores_of_nodes_are_those_of_their_directions(context, base):
    directions = Directions(torch.randn(3, 32, dtype=torch.float64))
    place = Place(2, -1)
    nodes = Pool([Node(2, -1, 0)], {-1: UNIT}, nodes={place: directions.vectors[1:2]})
    (found,) = _scores.score(context, base, nodes)
    (wanted,) = _scores.score(context, base, Pool([place], {-1: directions}))
    assert found.node == 0
    assert found.model_copy(update={"node": None}) == wanted


def test_a_map_of_one_layer_without_a_race(context):
    pool = replace(node_pool(3), places=[AT])
    assert pool.most([AT]) == 3
    stack = pool.stack([AT], 2)
    assert stack.layers == (LAYER,)
    assert stack.basis.abs().argmax(dim=0).tolist() == [0, 1]
    with pytest.raises(DirectionError, match=r"3 independent directions at layer 7, and k is 4"):
        pool.stack([AT], 4)


def test_controls_of_nodes_are_of_several_shuffles_of_the_layer():
    turned = [{-1: Directions(UNIT.vectors.roll(-8 * i, dims=0))} for i in (1, 2, 3, 4)]
    pool = node_pool(shuffled=turned)
    first, second = pool.shuffled_stacks(pool.places, 2, draws=3)
    assert first.abs().argmax(dim=0).tolist() == [LAYER - 1 + 8, LAYER - 1 + 16]
    assert second.abs().argmax(dim=0).tolist() == [LAYER - 1 + 24, (LAYER - 1 + 32) % 32]


def test_candidates_that_are_no_nodes_are_written_as_before():
    plain = candidate(3)
    assert "node" not in plain.model_dump()
    assert of_node(0).model_dump()["node"] == 0
    assert Candidate.model_validate(plain.model_dump()) == plain
    assert nodes_of([Place(1), Node(2, -1, 5)]) == (5,)
    assert [str(Node(2, -1, 5)), str(Node(2, "instruction", 0))] == [
        "2, node 5",
        "2 at instruction, node 0",
    ]
