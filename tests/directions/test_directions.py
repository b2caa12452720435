import json

import pytest
import torch
from safetensors.torch import save_file

from abliterator.directions import (
    Directions,
    Place,
    Subspace,
    fit_directions,
    fit_shuffled,
    load_subspace,
    per_layer,
    save_directions,
    stack,
    stack_at,
    within_layer,
)
from abliterator.errors import DirectionError
from abliterator.subspace import Moments, MomentSet

L, H = 4, 16


def moments(vectors: torch.Tensor) -> MomentSet:
    found = Moments(L, H)
    found.update(vectors)
    return found.freeze()


def test_a_planted_direction_is_recovered():
    planted = torch.nn.functional.normalize(torch.randn(L, H), dim=1)
    noise = torch.randn(400, L, H)
    target, contrast = moments(noise[:200] + 3 * planted), moments(noise[200:])
    found = fit_directions(target, contrast).vectors
    cosines = torch.nn.functional.cosine_similarity(found, planted.double(), dim=1)
    assert (cosines > 0.98).all()


def test_projection_removes_the_neutral_mean_and_nothing_else():
    target, contrast, neutral = (moments(torch.randn(9, L, H) + i) for i in range(3))
    plain = fit_directions(target, contrast).vectors
    projected = fit_directions(target, contrast, remove_mean_of=neutral).vectors
    unit = torch.nn.functional.normalize(neutral.mean, dim=1)
    assert (projected * unit).sum(dim=1).abs().max() < 1e-12
    removed = plain - projected
    along = (removed * unit).sum(dim=1, keepdim=True) * unit
    torch.testing.assert_close(removed, along, rtol=0, atol=1e-12)


def test_a_stack_keeps_the_order_of_preference():
    directions = Directions(torch.randn(L, H, dtype=torch.float64))
    found = stack(directions, (3, 1))
    first = directions.vectors[2] / directions.vectors[2].norm()
    assert found.layers == (3, 1)
    torch.testing.assert_close(found.basis[:, 0], first)


def test_dependent_layers_are_named():
    vectors = torch.randn(L, H, dtype=torch.float64)
    vectors[2] = -5 * vectors[0]
    with pytest.raises(DirectionError, match=r"layer 3 lies in the span of layer 1"):
        stack(Directions(vectors), (1, 3))


def test_a_subspace_survives_its_file(tmp_path):
    directions = Directions(torch.randn(L, H, dtype=torch.float64))
    subspace = stack(directions, (2, 4))
    save_directions(tmp_path / "d.safetensors", directions, subspace)
    found = load_subspace(tmp_path / "d.safetensors")
    assert found.layers == (2, 4)
    torch.testing.assert_close(found.basis, subspace.basis, rtol=0, atol=1e-14)


def test_a_subspace_of_each_block_survives_its_file_and_is_made_orthonormal(tmp_path):
    raw = torch.randn(L, H, 2, dtype=torch.float64)
    save_directions(tmp_path / "d.safetensors", Directions(torch.randn(L, H)), Subspace(raw, (1,)))
    found = load_subspace(tmp_path / "d.safetensors")
    assert found.basis.shape == (L, H, 2)
    for own, given in zip(found.basis, raw, strict=True):
        torch.testing.assert_close(own.T @ own, torch.eye(2).double(), rtol=0, atol=1e-12)
        assert torch.linalg.matrix_rank(torch.cat([own, given], dim=1)) == 2  # the same span


def test_somebody_elses_subspace_is_made_orthonormal(tmp_path):
    raw = torch.randn(H, 2) * torch.tensor([5.0, 0.1])
    save_file({"subspace": raw}, tmp_path / "q.safetensors", metadata={"layers": "third"})
    found = load_subspace(tmp_path / "q.safetensors")
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(found.basis.T @ found.basis, eye, rtol=0, atol=1e-12)
    assert found.layers == ()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"other": torch.zeros(2)}, "it holds other"),
        ({"subspace": torch.zeros(H)}, "shape"),
        ({"subspace": torch.zeros(H, 2, dtype=torch.int32)}, "floating-point"),
        ({"subspace": torch.zeros(H, 0)}, "k is 0"),
        ({"subspace": torch.zeros(H, 1)}, "column 0"),
        ({"subspace": torch.full((H, 1), float("nan"))}, "column 0"),
        ({"subspace": torch.ones(H, 2)}, "column 1"),
        ({"subspace": torch.ones(2, 3)}, "3 directions"),
        ({"subspace": torch.zeros(1, 1, H, 2)}, r"\[n_layers, d_model, k\]"),
        ({"subspace": torch.zeros(0, H, 2)}, "n_layers is 0"),
        ({"subspace": torch.ones(2, H, 2)}, "block 0, column 1"),
    ],
)
def test_files_without_a_subspace(tmp_path, tensors, says):
    save_file(tensors, tmp_path / "q.safetensors")
    with pytest.raises(DirectionError, match=says):
        load_subspace(tmp_path / "q.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a tensor file", json.dumps({}).encode() * 9])
def test_files_that_are_no_safetensors(tmp_path, content):
    (tmp_path / "q.safetensors").write_bytes(content)
    with pytest.raises(DirectionError, match=r"Cannot read a subspace"):
        load_subspace(tmp_path / "q.safetensors")


def test_directions_within_a_layer_are_the_mean_then_what_pairs_differ_in():
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(16)
    mean[0] = 3.0
    scale = torch.tensor([0.0, 5.0, 2.0, 1.0] + [0.0] * 12)
    pairs = mean + torch.randn(400, 16, generator=generator) * scale
    found = within_layer(pairs.mean(dim=0), pairs)
    assert len(found) == 4  # pairs differ along three more dimensions
    assert found[1:].abs().argmax(dim=1).tolist() == [1, 2, 3]
    torch.testing.assert_close(found[1:] @ found[0], torch.zeros(3, dtype=torch.float64))
    # oracle: eigenvectors of the covariance, once the mean's direction is projected out
    unit = found[0] / found[0].norm()
    rest = pairs.double() - (pairs.double() @ unit)[:, None] * unit
    values, vectors = torch.linalg.eigh(rest.T @ rest)
    assert float((vectors[:, -1] @ found[1]).abs()) == pytest.approx(1)
    assert values[-1] > values[-2]


def test_shuffled_labels_separate_prompts_but_not_kinds():
    """Where the kinds differ and nothing else does, their direction is 0; one odd prompt shows."""
    target, contrast = torch.ones(5, 2, 3), torch.zeros(4, 2, 3)
    target[0, :, 1] = 9.0

    def of(vectors):
        found = Moments(2, 3)
        found.update(vectors)
        return found.freeze()

    halves = [(of(target), of(target[1:3])), (of(contrast), of(contrast[:2]))]
    found = fit_shuffled(*halves).vectors
    expected = (target[1:3].mean(dim=0) - target[[0, 3, 4]].mean(dim=0)).double() / 2
    torch.testing.assert_close(found, expected)
    assert found[:, [0, 2]].abs().max() == 0


def test_each_block_loses_the_direction_of_the_nearest_layer():
    directions = Directions(torch.eye(5, 8, dtype=torch.float64))
    found = per_layer(directions, (4, 1))
    assert found.basis.shape == (5, 8, 1)
    assert found.basis[:, :, 0].argmax(dim=1).tolist() == [0, 0, 3, 3, 3]
    with pytest.raises(DirectionError, match="layer 2 has length 0"):
        per_layer(Directions(torch.zeros(5, 8)), (2,))


def test_places_say_their_position_where_it_is_not_the_last_token():
    assert [str(Place(3)), str(Place(3, -2))] == ["3", "3 at -2"]
    two = {-1: Directions(torch.eye(4)), -2: Directions(torch.zeros(4, 4))}
    with pytest.raises(DirectionError, match="layer 3 at -2 has length 0"):
        stack_at(two, [Place(1), Place(3, -2)])
