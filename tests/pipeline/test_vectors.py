"""Directions of other labels, from vectors that were captured once."""

import torch

from abliterator.directions import Cleaning, Observations
from abliterator.pipeline._positions import Reading
from abliterator.pipeline._study._vectors import LayerObservations, _together

LAYERS, N_LAYERS, D_MODEL, KIND = (2, 4), 5, 6, 100.0


def layer_observations(n_target=12, n_contrast=8):
    """Noise, and a large difference of the kinds along the first dimension."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(n_target + n_contrast, len(LAYERS), D_MODEL, generator=generator)
    vectors[:n_target, :, 0] += KIND
    observations = Observations.of_vectors(vectors[:n_target], vectors[n_target:])
    return LayerObservations(observations, LAYERS, N_LAYERS)


def difference(of):
    return of.directions("mean_difference", Cleaning()).vectors


def test_an_estimate_is_at_the_captured_layers_alone():
    of = layer_observations()
    sides = of.observations.vectors
    expected = sides["target"].double().mean(dim=0) - sides["contrast"].double().mean(dim=0)
    found = difference(of)
    torch.testing.assert_close(found[[1, 3]], expected, atol=1e-12, rtol=0)
    assert found.shape == (N_LAYERS, D_MODEL)
    assert not found[[0, 2, 4]].any()
    same = of.relabelled((range(12), range(12, 20)))
    assert torch.equal(difference(same), found)


def test_balanced_halves_have_none_of_the_difference_of_the_kinds_and_other_splits_have_some():
    of = layer_observations()
    balanced = [float(difference(of.balanced(f"{{name}} {i}"))[1, 0]) for i in range(20)]
    assert max(map(abs, balanced)) < 3
    assert len(set(balanced)) == 20
    uneven = of.relabelled((range(10), range(10, 20)))
    assert difference(uneven)[1, 0] > KIND / 2


def test_balanced_halves_have_as_many_prompts_of_each_kind_and_are_drawn_by_the_seed():
    of = layer_observations()
    one, again, other = (of.balanced(f"0 {{name}} {i}") for i in (1, 1, 2))
    for side in one.observations.vectors.values():
        assert (side[:, 0, 0] > KIND / 2).sum() == 6
        assert len(side) == 10
    assert (one.observations.target.n, one.observations.contrast.n) == (10, 10)
    assert torch.equal(difference(one), difference(again))
    assert not torch.equal(difference(one), difference(other))


def test_the_end_of_the_users_text_is_read_with_the_template_where_its_tail_has_one_length():
    whole = Reading((-1, -2), (-1, -2), range(2), [[1, 2, 3, 9, 8], [4, 5, 9, 8]])
    text = Reading(("instruction",), (-1,), range(2), [[1, 2, 3], [4, 5]])
    (together,) = _together([whole, text])
    assert together.positions == (-1, -2, "instruction")
    assert together.offsets == (-1, -2, -3)
    for ids, beginning in zip(together.token_ids, text.token_ids, strict=True):
        assert ids[together.offsets[2]] == beginning[-1]
    uneven = text._replace(token_ids=[[1, 2, 3], [4]])
    assert _together([whole, uneven]) == [whole, uneven]
    thinking = Reading(("after_thinking",), (-1,), range(2), [[1], [4]])
    assert _together([whole, thinking]) == [whole, thinking]
    assert _together([text]) == [text]
    assert len(_together([whole, text, thinking])) == 2
