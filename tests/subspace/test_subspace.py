import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterator.errors import DirectionError
from abliterator.formats import FORMATS
from abliterator.subspace import (
    Moments,
    Removal,
    ablate,
    compensate,
    compensating_rows,
    keep_column_norms,
    merged,
    orthonormal_basis,
    random_basis,
    removal_of_basis,
)
from abliterator.subspace._compensate import _smallest

H = 64


def basis_of(k: int, seed: int = 0, dim: int = H) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return orthonormal_basis(torch.randn(k, dim, generator=generator))


def panel(columns: int = 40, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(H, columns, generator=torch.Generator().manual_seed(7)).to(dtype)


def test_random_subspaces_are_orthonormal_seeded_and_not_of_one_direction():
    found = [random_basis(H, 3, seed=seed) for seed in range(40)]
    assert torch.equal(found[1], random_basis(H, 3, seed=1))
    for basis in found:
        torch.testing.assert_close(basis.T @ basis, torch.eye(3).double(), atol=1e-12, rtol=0)
    # uniform: every dimension holds its share of 40 x 3 unit vectors
    share = torch.cat(found, dim=1).square().mean(dim=1)
    assert share.max() < 2 / H
    assert share.min() > 0.5 / H


# ---- moments


def test_merged_moments_equal_one_batch():
    vectors = torch.randn(11, 3, 8, dtype=torch.float64) * 5 + 100
    whole = Moments(3, 8)
    whole.update(vectors)
    parts = []
    for batch in vectors.split([1, 4, 6]):
        part = Moments(3, 8)
        part.update(batch)
        parts.append(part.freeze())
    found, wanted = merged(parts), whole.freeze()
    assert found.n == wanted.n == 11
    torch.testing.assert_close(found.mean, wanted.mean)
    torch.testing.assert_close(found.m2, wanted.m2)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_streaming_moments_equal_one_batch(sizes):
    vectors = torch.randn(sum(sizes), 3, 8, dtype=torch.float64) * 5 + 100
    moments = Moments(3, 8)
    for batch in vectors.split(sizes):
        moments.update(batch)
    found = moments.freeze()
    assert found.n == len(vectors)
    torch.testing.assert_close(found.mean, vectors.mean(dim=0), rtol=1e-13, atol=0)
    oracle = ((vectors - vectors.mean(dim=0)) ** 2).sum(dim=0)
    torch.testing.assert_close(found.m2, oracle, rtol=1e-9, atol=1e-9)


def test_moments_keep_small_differences_beside_huge_activations():
    """An attention sink of 24,900 must not swallow a difference of 1e-4 (float32 sums would)."""
    moments = Moments(1, 2)
    for _ in range(1000):
        moments.update(torch.tensor([[[24_900.0, 1e-4]]], dtype=torch.float32))
    assert moments.freeze().mean[0].tolist() == pytest.approx([24_900.0, 1e-4], rel=1e-7)


def test_frozen_moments_do_not_change_with_later_updates():
    moments = Moments(1, 2)
    moments.update(torch.ones(1, 1, 2))
    before = moments.freeze()
    moments.update(torch.full((3, 1, 2), 9.0))
    assert before.mean.tolist() == [[1.0, 1.0]]
    assert before.n == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_their_layer(bad):
    vectors = torch.zeros(2, 4, 3)
    vectors[1, 2, 0] = bad
    with pytest.raises(DirectionError, match="layer 3"):
        Moments(4, 3).update(vectors)


# ---- bases


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_basis_is_orthonormal_and_spans_the_directions(k):
    directions = torch.randn(k, H) * torch.logspace(-3, 3, k)[:, None]
    q = orthonormal_basis(directions)
    assert q.shape == (H, k)
    torch.testing.assert_close(q.T @ q, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    left = directions.double() - directions.double() @ q @ q.T
    assert left.norm() <= 1e-10 * directions.double().norm()


def test_a_basis_of_one_is_the_unit_direction_with_its_sign():
    direction = torch.randn(1, H)
    unit = direction[0].double() / direction[0].double().norm()
    torch.testing.assert_close(orthonormal_basis(direction)[:, 0], unit, rtol=0, atol=1e-14)


def test_a_dependent_direction_is_named():
    a, b = torch.randn(2, H, dtype=torch.float64)
    with pytest.raises(DirectionError, match="layer 9"):
        orthonormal_basis(torch.stack([a, b, 2 * a - 3 * b]), ["layer 4", "layer 5", "layer 9"])


@pytest.mark.parametrize("length", [0.0, float("nan"), float("inf")])
def test_a_direction_without_a_length_is_named(length):
    directions = torch.randn(2, H)
    directions[1, :] = length
    with pytest.raises(DirectionError, match="layer 2"):
        orthonormal_basis(directions, ["layer 1", "layer 2"])


def test_more_directions_than_dimensions():
    with pytest.raises(DirectionError, match="3 directions"):
        orthonormal_basis(torch.randn(3, 2))


# ---- the edit


@pytest.mark.parametrize("k", [1, 3])
def test_full_strength_leaves_nothing_and_is_idempotent(k):
    w, q = panel(), basis_of(k)
    edited = ablate(w, q, 1.0)
    assert (q.T @ edited).norm() <= 1e-13 * (q.T @ w).norm()
    torch.testing.assert_close(ablate(edited, q, 1.0), edited, rtol=0, atol=1e-14)


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.5])
def test_a_strength_leaves_exactly_its_share(strength):
    w, q = panel(), basis_of(2)
    left = q.T @ ablate(w, q, strength)
    torch.testing.assert_close(left, (1 - strength) * (q.T @ w), rtol=1e-11, atol=1e-12)


def test_the_orthogonal_complement_is_unchanged_and_the_change_has_rank_k():
    w, q = panel(), basis_of(3)
    change = ablate(w, q, 1.0) - w
    complement = torch.eye(H, dtype=torch.float64) - q @ q.T
    assert (complement @ change).norm() <= 1e-13 * w.norm()
    assert torch.linalg.matrix_rank(change, rtol=1e-10) == 3


def test_the_edit_against_its_definition():
    w, q = panel(), basis_of(2)
    slow = torch.stack([c - 0.7 * sum((c @ v) * v for v in q.T) for c in w.T], dim=1)
    torch.testing.assert_close(ablate(w, q, 0.7), slow, rtol=1e-12, atol=1e-13)


def test_the_edit_is_on_the_output_side():
    """`nn.Linear` weights are [out, in]: the edited layer writes nothing along Q, for any input."""
    linear = torch.nn.Linear(H, H, bias=False).double()
    q = basis_of(1)
    x = torch.randn(5, H, dtype=torch.float64)
    assert (linear(x) @ q).norm() > 0.1  # it does write there before
    linear.weight.data = ablate(linear.weight.data, q, 1.0)
    assert (linear(x) @ q).norm() < 1e-13
    linear.weight.data = ablate(torch.randn(H, H).double().T, q, 1.0).T  # the wrong side
    assert (linear(x) @ q).norm() > 0.1


def test_kept_column_norms_keep_the_edit_exact():
    w, q = panel(), basis_of(2)
    edited = keep_column_norms(ablate(w, q, 1.0), w.norm(dim=0))
    torch.testing.assert_close(edited.norm(dim=0), w.norm(dim=0), rtol=1e-12, atol=0)
    assert (q.T @ edited).norm() <= 1e-13 * (q.T @ w).norm()
    rows = ablate(w, q, 1.0)
    rows = rows * (w.norm(dim=1) / rows.norm(dim=1))[:, None]
    assert (q.T @ rows).norm() > 0.01 * (q.T @ w).norm()  # which is why rows are not offered


def test_a_column_inside_the_subspace_is_not_blown_up():
    q = basis_of(1)
    w = torch.cat([q * 3, panel(1)], dim=1)
    edited = keep_column_norms(ablate(w, q, 1.0), w.norm(dim=0))
    assert edited[:, 0].norm() < 1e-12
    assert torch.isfinite(edited).all()


# ---- the edit through a gain


def removed(w, removal, strength):
    edited = w.clone()
    wrote = removal.remove(edited, strength)
    torch.testing.assert_close(wrote, removal.read.T @ w)
    return edited


@pytest.mark.parametrize("zeros", [0, 5, H - 3, H])
@pytest.mark.parametrize("k", [1, 3])
def test_nothing_is_left_behind_a_gain(k, zeros):
    w, q = panel(), basis_of(k)
    gain = 1 + 0.5 * torch.randn(H, dtype=torch.float64)
    gain[:zeros] = 0
    edited = removed(w, removal_of_basis(q, gain), 1.0)
    written = (q.T @ (gain[:, None] * w)).norm()
    assert (q.T @ (gain[:, None] * edited)).norm() <= 1e-12 * max(written, 1)
    assert torch.isfinite(edited).all()
    assert torch.linalg.matrix_rank(edited - w, rtol=1e-10) <= k
    if zeros == 0:
        plain = gain[:, None] * ablate(w, q, 1.0)
        assert (q.T @ plain).norm() > 0.05 * written


def test_equal_gains_are_no_gains():
    w, q = panel(), basis_of(2)
    through = removed(w, removal_of_basis(q, torch.full((H,), -3.0, dtype=w.dtype)), 0.7)
    torch.testing.assert_close(through, ablate(w, q, 0.7), rtol=1e-12, atol=1e-13)
    assert torch.equal(removed(w, removal_of_basis(q), 0.7), ablate(w, q, 0.7))


def test_the_weighting_keeps_the_output_nearer_to_the_ideal_one():
    """Against the least change of W (S = 1), for gains as uneven as real ones are."""
    w, q = panel(400), basis_of(1)
    gain = torch.exp(torch.randn(H, dtype=torch.float64))
    write = gain[:, None] * w
    ideal = write - q @ (q.T @ write)
    ours = gain[:, None] * removed(w, removal_of_basis(q, gain), 1.0)
    read = gain[:, None] * q
    least = gain[:, None] * (w - read @ (read.T @ w) / read.square().sum())
    assert (ours - ideal).norm() < 0.7 * (least - ideal).norm()


@pytest.mark.parametrize("gained", [False, True])
def test_weights_and_what_they_write_lose_the_same(gained):
    """The edit of W and the edit of the vectors W x are one operator, also for one edit a row."""
    w, x, q = torch.randn(H, 6).double(), torch.randn(5, 6).double(), basis_of(3)
    removal = removal_of_basis(q, torch.randn(H).double() if gained else None)
    edited = w.clone()
    assert torch.equal(removal.remove(edited, 0.7), removal.reads(w))
    written = x @ w.T
    expected = written - 0.7 * removal.removed(written)
    torch.testing.assert_close(x @ edited.T, expected, rtol=1e-12, atol=1e-13)
    rows = Removal(torch.stack([removal.take] * 2), torch.stack([removal.read] * 2))
    both = rows.removed(torch.stack([written, 2 * written]))
    torch.testing.assert_close(both[1], 2 * removal.removed(written), rtol=1e-12, atol=1e-13)


# ---- compensated rounding


def _squared_write(panel: torch.Tensor, basis: torch.Tensor) -> float:
    return float((basis.T @ panel).double().square().sum())


def rounded(name: str, k: int, dim: int, **options) -> tuple[float, float, float]:
    """Leak of nearest and of compensated rounding, and how much the rounding noise grew."""
    fmt = FORMATS[name]
    q = basis_of(k, dim=dim).float()
    stored = fmt.rounded(0.02 * torch.randn(dim, 200))
    exact = ablate(stored, q, 1.0)
    nearest, best = fmt.rounded(exact), compensated(exact, q, fmt)
    wrote = _squared_write(stored, q) ** 0.5
    plain, ours = (_squared_write(w, q) ** 0.5 / wrote for w in (nearest, best))
    return plain, ours, float((best - exact).norm() / (nearest - exact).norm())


def compensated(exact, q, fmt):
    stored = fmt.rounded(exact)
    rows = compensating_rows(q)
    error = q.T @ (stored - exact)
    stored[rows] = compensate(exact[rows], error, q[rows], lambda x, *_, **__: fmt.rounded(x))
    return stored


# float16 is so fine that the arithmetic in float32 is what is left
@pytest.mark.parametrize(
    ("name", "dim", "k", "times", "noise"),
    [
        *(("BF16", dim, k, 600, 1.03) for dim in (576, 2048) for k in (1, 4, 16)),
        ("BF16", 256, 1, 600, 1.03),
        ("BF16", 256, 4, 600, 1.03),
        ("BF16", 256, 16, 170, 1.055),  # few rows have few choices: see `compensate`
        ("F16", 2048, 1, 200, 1.03),
    ],
)
def test_compensated_rounding_leaks_less_for_hardly_more_noise(name, dim, k, times, noise):
    plain, ours, grown = rounded(name, k, dim)
    assert ours < plain / times
    assert grown < noise


@pytest.mark.parametrize("dim", [H, 256])
def test_a_direction_along_few_dimensions_moves_only_those(dim):
    """Directions of real models have a few huge coordinates; a row that reads nothing stays."""
    fmt = FORMATS["BF16"]
    q = torch.zeros(dim, 1)
    q[:3, 0] = torch.tensor([0.9, -0.4, 0.17])
    q /= q.norm()
    exact = ablate(fmt.rounded(0.02 * torch.randn(dim, 50)), q, 1.0)
    best, nearest = compensated(exact, q, fmt), fmt.rounded(exact)
    assert _squared_write(best, q) < _squared_write(nearest, q) / 2  # three elements can do no more
    assert torch.equal(best[3:], nearest[3:])


def test_nothing_is_moved_where_storing_is_exact():
    exact = panel(10, torch.float32)
    stored = compensate(exact, torch.zeros(2, 10), basis_of(2).float(), lambda x, *_, **__: x)
    assert torch.equal(stored, exact)


def test_the_smallest_are_adjusted_last_and_ties_have_one_order():
    numbers = torch.tensor([[4.0, 1.0], [-1.0, 0.0], [1.0, -3.0], [0.5, 1.0]])
    assert _smallest(numbers, 3).tolist() == [[2, 3], [1, 0], [3, 1]]


def test_following_several_ways_leaves_less(monkeypatch):
    _, best, _ = rounded("BF16", 4, 576)
    monkeypatch.setattr("abliterator.subspace._compensate.FOLLOWED", 1)
    _, first, _ = rounded("BF16", 4, 576)
    assert best < 0.9 * first
