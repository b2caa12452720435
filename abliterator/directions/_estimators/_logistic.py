"""The normal of a logistic probe that tells target from contrast prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from abliterator.directions._observations import Observations, as_long_as
from abliterator.errors import DirectionError

# The penalty on |w|² / 2 beside the mean loss, in units of the spread within the classes. The
# larger, the nearer the normal is to the mean difference, which is its limit.
PENALTY = 0.01
_STEPS = 100  # of Newton's method, which needs about ten
_HALVINGS = 40
_FLAT = 1e-9  # length of the gradient at a minimum


def logistic(observations: Observations, *, penalty: float = PENALTY) -> Tensor:
    """The normal w of an L2-regularised logistic probe at every layer, [L, H] float64.

    w, b minimise the mean of log(1 + exp(-y (w·x + b))), both classes weighing half whatever their
    sizes, plus penalty |w|² / 2 (linear probes: Alain and Bengio 2016, arXiv 1610.01644). x is a
    vector less the middle of the class means, in units of the root mean square distance from the
    mean of its class, so that the penalty means the same at every layer. The minimum is unique, and
    found by Newton's method, without random numbers. Each row has the length of the mean
    difference.
    """
    n_layers = len(observations.target.mean)
    rows = []
    for layer in range(1, n_layers + 1):
        target, contrast = observations.classes(layer)
        difference = target.mean(dim=0) - contrast.mean(dim=0)
        normal, converged = probe(target, contrast, penalty=penalty)
        if not converged:
            raise DirectionError(
                f"`estimator: logistic` did not converge at layer {layer}. Check that its "
                "activations are finite, or take another estimator."
            )
        rows.append(as_long_as(difference, normal))
    return torch.stack(rows)


def probe(target: Tensor, contrast: Tensor, *, penalty: float) -> tuple[Tensor, bool]:
    """The normal w [H] of the probe in units of the spread, and whether it was found.

    w is a combination of the N vectors, so it is sought in min(N, H) dimensions.

    Args:
        target: [N, H] float64.
        contrast: the same of the other class.
        penalty: of |w|² / 2, above 0.
    """
    features, labels, weights = scaled_classes(target, contrast)
    if features.shape[0] < features.shape[1]:
        frame, triangle = torch.linalg.qr(features.T)
        coordinates = triangle.T
    else:
        frame, coordinates = None, features
    parameters, converged = _minimize(coordinates, labels, weights, penalty)
    normal = parameters[:-1]
    return (normal if frame is None else frame @ normal), converged


def scaled_classes(target: Tensor, contrast: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All vectors [N, H] centred and in units of the spread, labels 1 and 0, and weights of sum 1.

    The centre is the middle of the class means; the spread is the root mean square distance of a
    vector from the mean of its class, 1 where there is none.
    """
    classes = (target, contrast)
    means = [vectors.mean(dim=0) for vectors in classes]
    spread = (
        torch.stack(
            [(v - m).square().sum(dim=1).mean() for v, m in zip(classes, means, strict=True)]
        )
        .mean()
        .sqrt()
    )
    features = torch.cat(classes) - (means[0] + means[1]) / 2
    labels = torch.cat([torch.ones(len(target)), torch.zeros(len(contrast))]).double()
    weights = torch.cat([torch.full_like(v[:, 0], 0.5 / len(v)) for v in classes])
    return features / (spread if spread > 0 else 1.0), labels, weights


def probe_loss(
    parameters: Tensor, features: Tensor, labels: Tensor, weights: Tensor, penalty: float
) -> Tensor:
    """The weighted mean loss plus the penalty; `parameters` are w, then b."""
    normal, offset = parameters[:-1], parameters[-1]
    margins = (2 * labels - 1) * (features @ normal + offset)
    losses = torch.nn.functional.softplus(-margins)
    return weights @ losses + penalty / 2 * normal.square().sum()


def _minimize(
    features: Tensor, labels: Tensor, weights: Tensor, penalty: float
) -> tuple[Tensor, bool]:
    """Newton's method; a step is halved until it lowers the loss, or the gradient near the end."""
    extended = torch.cat([features, torch.ones(len(features), 1).double()], dim=1)
    ridge = torch.full((extended.shape[1],), penalty, dtype=torch.float64)
    ridge[-1] = 0  # the offset is free
    parameters = torch.zeros(extended.shape[1]).double()

    def gradient_at(point: Tensor) -> Tensor:
        residuals = torch.sigmoid(extended @ point) - labels
        return extended.T @ (weights * residuals) + ridge * point

    def loss_at(point: Tensor) -> float:
        return float(probe_loss(point, features, labels, weights, penalty))

    for _ in range(_STEPS):
        gradient = gradient_at(parameters)
        probability = torch.sigmoid(extended @ parameters)
        curvature = weights * probability * (1 - probability)
        hessian = extended.T @ (curvature[:, None] * extended) + ridge.diag()
        step = torch.linalg.solve(hessian, gradient)
        loss, steepness = loss_at(parameters), float(gradient.norm())
        for halving in range(_HALVINGS):
            moved = parameters - step / 2**halving
            # at the end the loss is the same to rounding, and the gradient still says more
            if loss_at(moved) < loss or float(gradient_at(moved).norm()) < steepness / 2:
                parameters = moved
                break
        else:
            return parameters, steepness < _FLAT
    return parameters, False
