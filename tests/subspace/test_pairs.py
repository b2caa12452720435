"""Pairs (U, V) against slow definitions with matrices [H, H], and their bounds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterator.subspace import (
    Removal,
    lengths_of,
    pair_cosines,
    pair_distances,
    pairs_of_removals,
    random_basis,
    with_lengths,
)

M, H = 3, 8


def random_columns(r, *, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(M, 2, H, r, generator=chance, dtype=torch.float64)


def products(pairs):
    """U Vᵀ of each module [M, H, H]."""
    return pairs[:, 0] @ pairs[:, 1].mT


@pytest.mark.parametrize("r", [1, 3])
def test_distances_and_cosines_are_those_of_the_matrices(r):
    pairs, start = random_columns(r), random_columns(r, seed=1)
    one, other = products(pairs), products(start)
    norms = other.flatten(1).norm(dim=1)
    distances = (one - other).flatten(1).norm(dim=1) ** 2 / norms**2
    torch.testing.assert_close(pair_distances(pairs, start), distances, rtol=1e-9, atol=1e-9)
    cosines = (one * other).sum(dim=(1, 2)) / (norms * one.flatten(1).norm(dim=1))
    torch.testing.assert_close(pair_cosines(pairs, start), cosines, rtol=1e-9, atol=1e-9)
    nothing = torch.zeros(M, dtype=torch.float64)
    torch.testing.assert_close(pair_distances(start, start), nothing, rtol=0, atol=1e-12)


def test_pairs_of_removals_are_the_same_products():
    removals = [Removal(5 * random_basis(H, 2, seed=i), random_columns(2)[i, 1]) for i in range(M)]
    pairs = pairs_of_removals(removals)
    expected = torch.stack([removal.take @ removal.read.mT for removal in removals])
    torch.testing.assert_close(products(pairs), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pairs[:, 1].norm(dim=1), torch.ones(M, 2, dtype=torch.float64))


@given(st.integers(0, 99), st.sampled_from([0.0, 1e-30, 1.0, 1e30]), st.sampled_from([1, 3]))
def test_whatever_a_step_leaves_is_finite_and_bounded(seed, size, r):
    lengths = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    pairs = with_lengths(size * random_columns(r, seed=seed), lengths)
    assert bool(pairs.isfinite().all())
    assert bool((lengths_of(pairs) <= lengths * (1 + 1e-12)).all())
    assert float(pairs[:, 1].norm(dim=1).max()) <= 1 + 1e-12
    if size == 1:
        torch.testing.assert_close(lengths_of(pairs), lengths)
