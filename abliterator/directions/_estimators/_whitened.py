"""The mean difference under the inverse of the pooled covariance: Fisher's discriminant."""

from __future__ import annotations

import torch
from torch import Tensor

from abliterator.directions._observations import Observations, as_long_as
from abliterator.errors import DirectionError


def whitened(observations: Observations) -> Tensor:
    """R = Σ⁻¹ (mean(target) - mean(contrast)) at every layer, [L, H] float64.

    Σ is the covariance within the two classes, shrunk towards a multiple of the identity by the
    rule of Ledoit and Wolf (2004, "A well-conditioned estimator for large-dimensional covariance
    matrices"). Dimensions in which prompts of one class differ among themselves count for less than
    in the mean difference. Each row has the length of the mean difference: where it is removed only
    its direction matters, and where it is added it is then comparable.
    """
    n_layers = len(observations.target.mean)
    return torch.stack([_of_layer(observations, layer) for layer in range(1, n_layers + 1)])


def _of_layer(observations: Observations, layer: int) -> Tensor:
    classes = observations.classes(layer)
    difference = classes[0].mean(dim=0) - classes[1].mean(dim=0)
    deviations = torch.cat([vectors - vectors.mean(dim=0) for vectors in classes])
    try:
        discriminant = inverse_covariance_times(deviations, difference)
    except ValueError as error:
        raise DirectionError(f"`estimator: whitened` at layer {layer}: {error}") from error
    return as_long_as(difference, discriminant)


def inverse_covariance_times(
    deviations: Tensor, vector: Tensor, *, shrinkage: float | None = None
) -> Tensor:
    """Σ⁻¹ v for Σ = (1 - s) ZᵀZ / N + s μ I, μ the mean variance, in min(N, H) dimensions.

    With fewer vectors than dimensions no H x H matrix is made: with a = (1 - s) / N and b = s μ,
    Σ⁻¹ v = (v - Zᵀ (Z Zᵀ + b / a I)⁻¹ Z v) / b (Woodbury).

    Args:
        deviations: Z [N, H] float64, each vector less the mean of its class.
        vector: v [H] float64.
        shrinkage: s from 0 to 1; Ledoit and Wolf's unless given.

    Returns:
        [H]; v itself where nothing varies.

    Raises:
        ValueError: without shrinkage where the covariance is singular.
    """
    n, d_model = deviations.shape
    mean_variance = float(deviations.square().sum()) / n / d_model
    if mean_variance == 0:
        return vector
    if shrinkage is None:
        shrinkage = ledoit_wolf_shrinkage(deviations)
    scale, ridge = (1 - shrinkage) / n, shrinkage * mean_variance
    if scale == 0:
        return vector / ridge
    if n >= d_model:
        covariance = scale * deviations.T @ deviations + ridge * torch.eye(d_model).double()
        factor, singular = torch.linalg.cholesky_ex(covariance)
        if singular:
            raise ValueError("the covariance is singular; some dimensions do not vary")
        solved: Tensor = torch.cholesky_solve(vector[:, None], factor)[:, 0]
        return solved
    if ridge == 0:
        raise ValueError(f"a covariance of {n} vectors in {d_model} dimensions is singular")
    gram = deviations @ deviations.T + ridge / scale * torch.eye(n).double()
    explained = torch.linalg.solve(gram, deviations @ vector)
    solution: Tensor = (vector - deviations.T @ explained) / ridge
    return solution


def ledoit_wolf_shrinkage(deviations: Tensor) -> float:
    """The share of μ I in the shrunk covariance of vectors [N, H] whose mean is 0, from 0 to 1.

    min(b², d²) / d² with d² = |S - μ I|² the distance to the target, and b² the sampling error of S
    = ZᵀZ / N, all of which the products between vectors, [N, N] or [H, H], give.
    """
    n, d_model = deviations.shape
    products = deviations @ deviations.T if n < d_model else deviations.T @ deviations
    squared = float(products.square().sum()) / n**2  # |S|², the same either way
    mean_variance = float(products.diagonal().sum()) / n / d_model
    distance = squared - d_model * mean_variance**2
    fourth = float(deviations.square().sum(dim=1).square().sum())
    error = (fourth / n - squared) / n
    return min(max(error, 0.0) / distance, 1.0) if distance > 0 else 1.0
