"""Estimators: each against a slow definition, its properties, and what is removed afterwards."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.optimize import root
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from torch.autograd.functional import hessian, jacobian

from abliterator.directions import (
    ESTIMATORS,
    STACKS,
    Cleaning,
    Directions,
    Observations,
    cosines_between,
    estimate,
    fit_directions,
    leave_one_set_out,
    moments_of,
)
from abliterator.directions._estimators._cleaning import protected_directions, residualized
from abliterator.directions._estimators._logistic import (
    PENALTY,
    logistic,
    probe,
    probe_loss,
    scaled_classes,
)
from abliterator.directions._estimators._whitened import (
    inverse_covariance_times,
    ledoit_wolf_shrinkage,
    whitened,
)
from abliterator.errors import DirectionError
from abliterator.recipe import BY_WRITER, DirectionSettings
from abliterator.subspace import Moments

L = 2


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def observed(h=12, n=(30, 24), **more):
    """Two correlated sets that differ along one dimension, float64 to compare to 1e-9."""
    mixing = random(h, h, seed=3)
    target, contrast = (random(k, L, h, seed=i) @ mixing for i, k in enumerate(n))
    target[..., 0] += 2
    return replace(Observations.of_vectors(target, contrast), **more)


def sets(h=12, names=("arithmetic", "code", "french")):
    return {
        name: moments_of(random(20, L, h, seed=10 + i) + 3 * random(1, L, h, seed=20 + i))
        for i, name in enumerate(names)
    }


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=-1)


def test_every_name_of_a_recipe_has_a_function_and_the_vectors_that_it_reads():
    fields = DirectionSettings.model_fields
    assert {*get_args(fields["estimator"].annotation)} == {*ESTIMATORS, "tuned"}
    # pairs (U, V) of writers are no subspace; they are made from a stack of layers
    assert {*get_args(fields["stack"].annotation)} == {*STACKS, *BY_WRITER}
    for name, estimator in ESTIMATORS.items():
        assert bool(DirectionSettings(estimator=name).stored_sets) is estimator.needs_vectors
    for name, method in STACKS.items():
        settings = DirectionSettings(stack=name)
        assert settings.stored_sets == {*method.needs_vectors}
        assert settings.of_one_layer is (method.within is not None)


@pytest.mark.parametrize("projection", [False, True])
def test_the_mean_difference_is_what_it_was(projection):
    o = observed(neutral=moments_of(random(9, L, 12, seed=7)))
    wanted = fit_directions(o.target, o.contrast, remove_mean_of=o.neutral if projection else None)
    found = estimate("mean_difference", o, Cleaning(projection=projection))
    assert torch.equal(found.vectors, wanted.vectors)
    without = estimate("mean_difference", replace(o, neutral=None), Cleaning(projection=True))
    own = fit_directions(o.target, o.contrast, remove_mean_of=o.contrast)
    assert torch.equal(without.vectors, own.vectors)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("h", [12, 90])
def test_an_estimate_is_deterministic_and_as_long_as_the_mean_difference(name, h):
    once, again = (estimate(name, observed(h)).vectors for _ in range(2))
    assert torch.equal(once, again)
    o = observed(h)
    lengths = (o.target.mean - o.contrast.mean).norm(dim=1)
    torch.testing.assert_close(once.norm(dim=1), lengths, rtol=1e-12, atol=0)


def test_moments_of_vectors_are_those_of_batches():
    vectors = random(31, L, 7)
    batches = Moments(L, 7)
    for batch in vectors.split(8):
        batches.update(batch)
    found, wanted = moments_of(vectors), batches.freeze()
    assert found.n == wanted.n
    torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.m2, wanted.m2, rtol=1e-12, atol=0)


# ---- whitened


@pytest.mark.parametrize(("n", "h"), [((30, 24), 12), ((30, 24), 90)])
def test_whitened_is_the_difference_under_the_shrunk_covariance_of_scikit_learn(n, h):
    o = observed(h, n)
    for layer in range(1, L + 1):
        classes = o.classes(layer)
        deviations = torch.cat([c - c.mean(dim=0) for c in classes]).numpy()
        covariance = torch.from_numpy(LedoitWolf(assume_centered=True).fit(deviations).covariance_)
        wanted = torch.linalg.inv(covariance) @ (classes[0].mean(dim=0) - classes[1].mean(dim=0))
        found = whitened(o)[layer - 1]
        torch.testing.assert_close(unit(found), unit(wanted), rtol=0, atol=1e-9)


@pytest.mark.parametrize("h", [12, 90])
def test_the_shrinkage_is_that_of_the_definition(h):
    deviations = random(40, h) * torch.linspace(0.1, 3, h)
    covariance = deviations.T @ deviations / 40
    target = covariance.trace() / h * torch.eye(h).double()
    errors = [(z[:, None] * z - covariance).square().sum() for z in deviations]
    error = torch.stack(errors).sum() / 40**2
    wanted = float(error / (covariance - target).square().sum())
    assert 0.01 < wanted < 1
    assert ledoit_wolf_shrinkage(deviations) == pytest.approx(wanted, rel=1e-9)


def test_whitened_without_shrinkage_does_not_depend_on_the_coordinates():
    """Under x -> A x the discriminant r becomes A⁻ᵀ r, so that r·x is the same score."""
    deviations, difference, mixing = random(40, 12), random(12, seed=1), random(12, 12, seed=2)
    plain = inverse_covariance_times(deviations, difference, shrinkage=0.0)
    mixed = inverse_covariance_times(deviations @ mixing.T, mixing @ difference, shrinkage=0.0)
    torch.testing.assert_close(mixing.T @ mixed, plain, rtol=1e-9, atol=1e-9)
    shrunk = inverse_covariance_times(deviations @ mixing.T, mixing @ difference, shrinkage=0.5)
    assert not torch.allclose(mixing.T @ shrunk, plain, rtol=0.1)


@pytest.mark.parametrize("shrinkage", [0.01, 0.5, 1.0])
def test_few_vectors_and_many_give_the_same_by_either_formula(shrinkage):
    deviations, vector = random(20, 33), random(33, seed=1)
    found = inverse_covariance_times(deviations, vector, shrinkage=shrinkage)
    covariance = deviations.T @ deviations / 20
    target = covariance.trace() / 33 * torch.eye(33).double()
    shrunk = (1 - shrinkage) * covariance + shrinkage * target
    torch.testing.assert_close(found, torch.linalg.solve(shrunk, vector), rtol=1e-9, atol=1e-9)


def test_a_dimension_that_varies_within_the_sets_counts_for_less():
    target, contrast = (random(200, 1, 2, seed=i) * torch.tensor([1, 10]) for i in (1, 2))
    target += 2
    plain, found = (
        unit(estimate(name, Observations.of_vectors(target, contrast)).vectors)[0]
        for name in ("mean_difference", "whitened")
    )
    assert abs(found[0]) > abs(plain[0])
    assert abs(found[0]) > 0.99


def test_a_covariance_that_cannot_be_inverted():
    with pytest.raises(ValueError, match="20 vectors in 33 dimensions is singular"):
        inverse_covariance_times(random(20, 33), random(33), shrinkage=0.0)
    with pytest.raises(ValueError, match="some dimensions do not vary"):
        inverse_covariance_times(random(20, 3) * torch.tensor([1, 1, 0]), random(3), shrinkage=0.0)
    assert torch.equal(inverse_covariance_times(torch.zeros(5, 3).double(), random(3)), random(3))


def test_vectors_are_needed_where_moments_are_not_enough():
    o = observed()
    with pytest.raises(DirectionError, match="only moments were captured"):
        estimate("whitened", Observations(o.target, o.contrast))


# ---- logistic


@pytest.mark.parametrize(("n", "h"), [((30, 24), 12), ((30, 24), 90)])
def test_logistic_is_where_the_gradient_of_the_loss_in_all_dimensions_is_zero(n, h):
    target, contrast = observed(h, n).classes(1)
    features, labels, weights = scaled_classes(target, contrast)

    def loss(parameters):
        return probe_loss(parameters, features, labels, weights, PENALTY)

    slow = root(
        lambda x: jacobian(loss, torch.from_numpy(x)).numpy(),
        np.zeros(h + 1),
        jac=lambda x: hessian(loss, torch.from_numpy(x)).numpy(),
        tol=1e-15,
    )
    found, converged = probe(target, contrast, penalty=PENALTY)
    assert converged
    torch.testing.assert_close(found, torch.from_numpy(slow.x[:-1]), rtol=0, atol=1e-9)


def test_logistic_is_the_probe_of_scikit_learn():
    """Its objective is |w|² / 2 + C Σ weight x loss; it stops earlier than ours."""
    target, contrast = observed(12).classes(1)
    features, labels, weights = (t.numpy() for t in scaled_classes(target, contrast))
    other = LogisticRegression(C=1 / PENALTY, tol=1e-9, solver="newton-cholesky")
    other.fit(features, labels, sample_weight=weights)
    found, _ = probe(target, contrast, penalty=PENALTY)
    torch.testing.assert_close(found, torch.from_numpy(other.coef_[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("h", [12, 90])
def test_the_gradient_vanishes_at_the_probe(h):
    target, contrast = observed(h).classes(2)
    features, labels, weights = scaled_classes(target, contrast)
    normal, _ = probe(target, contrast, penalty=PENALTY)
    # the offset is not returned: its own gradient is zero at one value alone
    offset = torch.zeros(1).double()
    for _ in range(60):
        p = torch.sigmoid(features @ normal + offset)
        offset = offset - (weights @ (p - labels)) / (weights @ (p * (1 - p)))
    parameters = torch.cat([normal, offset]).requires_grad_()
    probe_loss(parameters, features, labels, weights, PENALTY).backward()
    assert parameters.grad.norm() < 1e-9


def test_a_large_penalty_gives_the_mean_difference_and_a_small_one_separates():
    o = observed(90)
    difference = o.target.mean - o.contrast.mean
    stiff = logistic(o, penalty=1e6)
    torch.testing.assert_close(unit(stiff), unit(difference), rtol=0, atol=1e-5)
    soft = logistic(o, penalty=1e-6)
    for layer in (1, 2):
        target, contrast = (c @ soft[layer - 1] for c in o.classes(layer))
        assert target.min() > contrast.max()
        plain = [c @ difference[layer - 1] for c in o.classes(layer)]
        assert plain[0].min() < plain[1].max()


def test_a_set_twice_as_large_changes_nothing():
    target, contrast = random(20, 2, 6) + 1, random(30, 2, 6, seed=1)
    once = estimate("logistic", Observations.of_vectors(target, contrast)).vectors
    doubled = Observations.of_vectors(torch.cat([target, target]), contrast)
    torch.testing.assert_close(estimate("logistic", doubled).vectors, once, rtol=1e-9, atol=1e-9)


# ---- protected sets


def test_without_ridge_a_direction_is_orthogonal_to_the_sets():
    o = observed(protected=sets())
    raw = estimate("mean_difference", replace(o, protected={}))
    found = estimate("mean_difference", o, Cleaning(ridge=0.0))
    along = (unit(found.vectors)[:, None] * protected_directions(o)).sum(dim=2)
    assert along.abs().max() < 1e-12
    assert (unit(raw.vectors)[:, None] * protected_directions(o)).sum(dim=2).abs().max() > 0.1


@pytest.mark.parametrize("ridge", [0.0, 0.01, 3.0])
def test_the_residual_is_that_of_a_ridge_regression_of_each_layer(ridge):
    vectors, protected = random(L, 12), unit(random(L, 3, 12, seed=1))
    found = residualized(vectors, protected, ridge)
    for r, a, kept in zip(vectors, protected, found, strict=True):
        # least squares on a design with sqrt(ridge) I below it
        design = torch.cat([a.T, ridge**0.5 * torch.eye(3).double()])
        weights = torch.linalg.lstsq(design, torch.cat([r, torch.zeros(3)])[:, None]).solution
        torch.testing.assert_close(kept, r - (a.T @ weights)[:, 0], rtol=0, atol=1e-9)


def test_of_one_set_the_ridge_leaves_its_share():
    vectors, protected = random(L, 12), unit(random(L, 1, 12, seed=1))
    along = (residualized(vectors, protected, 0.25) * protected[:, 0]).sum(dim=1)
    torch.testing.assert_close(along, 0.2 * (vectors * protected[:, 0]).sum(dim=1))


def test_two_sets_of_one_direction_are_as_one():
    vectors, protected = random(L, 12), unit(random(L, 1, 12, seed=1))
    twice = residualized(vectors, protected.expand(-1, 2, -1), 0.0)
    torch.testing.assert_close(twice, residualized(vectors, protected, 0.0), rtol=0, atol=1e-12)


def test_a_sets_direction_is_its_mean_less_that_of_ordinary_prompts():
    neutral = moments_of(random(9, L, 12, seed=7))
    protected = sets(names=("b", "a"))
    found = protected_directions(observed(protected=protected, neutral=neutral))
    torch.testing.assert_close(found[:, 0], unit(protected["a"].mean - neutral.mean))
    o = observed(protected=protected)
    torch.testing.assert_close(
        protected_directions(o)[:, 1], unit(protected["b"].mean - o.contrast.mean)
    )


def test_what_is_left_of_a_set_that_is_protected_and_of_one_that_is_not():
    o = observed(protected=sets())
    shares = leave_one_set_out("mean_difference", o, Cleaning(ridge=0.0))
    assert list(shares) == ["arithmetic", "code", "french"]
    for i, (name, share) in enumerate(shares.items()):
        a = protected_directions(o)[:, i]
        others = {n: m for n, m in o.protected.items() if n != name}
        partly = estimate("mean_difference", replace(o, protected=others), Cleaning(ridge=0.0))
        raw = o.target.mean - o.contrast.mean
        torch.testing.assert_close(share.before, (unit(raw) * a).sum(dim=1).abs())
        torch.testing.assert_close(share.left_out, (unit(partly.vectors) * a).sum(dim=1).abs())
        assert share.protected.max() < 1e-12 < share.left_out.min()


def test_the_neutral_mean_is_removed_before_the_sets():
    o = observed(protected=sets(), neutral=moments_of(random(9, L, 12, seed=7) + 4))
    both = estimate("whitened", o, Cleaning(projection=True, ridge=0.0)).vectors
    assert ((both[:, None] * protected_directions(o)).sum(dim=2)).abs().max() < 1e-10
    sets_only = estimate("whitened", o, Cleaning(ridge=0.0)).vectors
    assert not torch.allclose(both, sets_only, rtol=1e-3)


def test_cosines_of_two_estimates():
    one, other = random(3, 8), random(3, 8, seed=1)
    other[1] = -2 * one[1]
    found = cosines_between(Directions(one), Directions(other))
    wanted = [float(a @ b / a.norm() / b.norm()) for a, b in zip(one, other, strict=True)]
    assert found.tolist() == pytest.approx(wanted)
    assert found[1] == pytest.approx(-1)
