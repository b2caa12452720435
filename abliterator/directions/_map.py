"""A self-organising map of the target prompts: several directions of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from abliterator.directions._estimators import Cleaning, cleaned
from abliterator.directions._observations import Observations
from abliterator.subspace import DEPENDENT_BELOW

GRID = (4, 4)
_EPOCHS = 50
# Width of the neighbourhood on the grid in the last epoch; in the first it is half the longer side.
_LAST_WIDTH = 0.3


def map_directions(
    observations: Observations,
    layer: int,
    *,
    grid: tuple[int, int] = GRID,
    cleaning: Cleaning | None = None,
) -> Tensor:
    """Directions of one layer from a self-organising map of the target prompts' vectors.

    Each node less the contrast mean is a direction ("SOM Directions are Better than One", arXiv
    2511.08379); a map of one node is the mean difference. The nodes are in `covering_order`; those
    to which no prompt is nearest, and those whose direction depends on earlier ones, are left out.

    Args:
        observations: with the vectors of the target prompts.
        layer: residual layer, 1 .. L.
        grid: rows and columns of nodes.
        cleaning: what is removed from every direction.

    Returns:
        [n, H] float64, n from 1 to the number of nodes.
    """
    vectors = observations.at_layer("target", layer)
    nodes = self_organizing_map(vectors, grid)
    ordered = nodes[covering_order(nodes, vectors)]
    directions = ordered - observations.contrast.mean[layer - 1]
    return _independent(cleaned(directions, observations, cleaning or Cleaning(), layer=layer))


def self_organizing_map(vectors: Tensor, grid: tuple[int, int]) -> Tensor:
    """The nodes of a self-organising map of some vectors, by Kohonen's batch algorithm.

    The nodes begin as a sheet in the plane of the two first principal components. In each epoch
    every vector goes to its nearest node, and node j becomes the mean of all vectors weighed by
    exp(-d² / 2σ²), d the distance on the grid from j to the vector's node; σ falls geometrically
    from half the longer side to 0.3. Nothing is drawn (the paper's map is trained by 10,000 random
    draws), so that the same vectors give the same nodes.

    Args:
        vectors: [N, H] float64.
        grid: rows and columns.

    Returns:
        [rows x columns, H] float64, row by row.
    """
    rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    squared = (places[:, None] - places[None]).square().sum(dim=2)
    nodes = _sheet(vectors, places)
    first = max(max(rows, columns) / 2, _LAST_WIDTH)
    for epoch in range(_EPOCHS):
        width = first * (_LAST_WIDTH / first) ** (epoch / (_EPOCHS - 1))
        kernel = torch.exp(-squared / (2 * width**2))
        weights = kernel[:, nearest_nodes(vectors, nodes)]
        # a node far from all that win keeps its place: its weights are 0 to rounding
        total = weights.sum(dim=1, keepdim=True)
        nodes = torch.where(total > 1e-12, weights @ vectors / total.clamp_min(1e-12), nodes)
    return nodes


def nearest_nodes(vectors: Tensor, nodes: Tensor) -> Tensor:
    """The index [N] of the node [n, H] that is nearest to each vector; of equals the first."""
    return squared_distances(vectors, nodes).argmin(dim=1)


def squared_distances(vectors: Tensor, nodes: Tensor) -> Tensor:
    """|x - m|² [N, n] of vectors [N, H] and nodes [n, H].

    About their common mean, since the products of large vectors would leave rounding alone.
    """
    center = vectors.mean(dim=0)
    vectors, nodes = vectors - center, nodes - center
    products = vectors @ nodes.T
    lengths = vectors.square().sum(dim=1)[:, None] + nodes.square().sum(dim=1)
    return (lengths - 2 * products).clamp_min(0)


def covering_order(nodes: Tensor, vectors: Tensor) -> Tensor:
    """Indices of the nodes that win a vector, those first that cover the most distance.

    Each next node is that with which the vectors' summed squared distance to the nearest of the
    nodes so far is smallest: first the best single one, then what it leaves uncovered.
    """
    distances = squared_distances(vectors, nodes)
    remaining = sorted(set(distances.argmin(dim=1).tolist()))
    order: list[int] = []
    uncovered = torch.full((len(vectors),), float("inf")).double()
    while remaining:
        sums = [float(torch.minimum(uncovered, distances[:, j]).sum()) for j in remaining]
        best = remaining.pop(min(range(len(sums)), key=sums.__getitem__))
        order.append(best)
        uncovered = torch.minimum(uncovered, distances[:, best])
    return torch.tensor(order)


def _sheet(vectors: Tensor, places: Tensor) -> Tensor:
    """Nodes at the vectors' mean, spread along their two first principal components."""
    mean = vectors.mean(dim=0)
    deviations = vectors - mean
    values, weights = torch.linalg.eigh(deviations @ deviations.T / len(vectors))
    nodes = mean.expand(len(places), -1)
    # the largest value is last; each component's own sign is arbitrary, so it is made unique
    for axis, (value, weight) in enumerate(
        zip(values.flip(0)[:2], weights.T.flip(0)[:2], strict=True)
    ):
        component = torch.nn.functional.normalize(deviations.T @ weight, dim=0)
        component = component * component[component.abs().argmax()].sign()
        along = places[:, 1 - axis]
        span = (2 * along / along.max().clamp_min(1) - 1) * (along.max() > 0)
        nodes = nodes + span[:, None] * value.clamp_min(0).sqrt() * component
    return nodes


def _independent(directions: Tensor) -> Tensor:
    """The directions [n, H] that do not lie in the span of those before them."""
    kept: list[Tensor] = []
    basis = torch.zeros(0, directions.shape[1]).double()
    for direction in directions:
        unit = torch.nn.functional.normalize(direction, dim=0)
        rest = unit - basis.T @ (basis @ unit)
        rest = rest - basis.T @ (basis @ rest)  # twice is enough (Kahan, Parlett)
        if rest.norm() >= 2 * DEPENDENT_BELOW or not kept:
            kept.append(direction)
            basis = torch.cat([basis, torch.nn.functional.normalize(rest, dim=0)[None]])
    return torch.stack(kept)
