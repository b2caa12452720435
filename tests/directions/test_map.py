"""Several directions of one layer from a map, and directions removed one by one or together."""

import math
from dataclasses import replace

import pytest
import torch

from abliterator.directions import (
    Cleaning,
    Observations,
    Sources,
    estimate,
    left_behind,
    map_directions,
    moments_of,
    sequential_removal,
    stack,
    subspace_of,
    within_layer,
)
from abliterator.directions._map import covering_order, nearest_nodes, self_organizing_map
from abliterator.errors import DirectionError
from abliterator.subspace import orthonormal_basis


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clusters(k, h=10, n=12):
    """k well separated clusters of n vectors, with their centres."""
    centres = 8 * random(k, h, seed=5)
    return (centres[:, None] + 0.3 * random(k, n, h, seed=6)).reshape(-1, h), centres


def observed(vectors, seed=9):
    return Observations.of_vectors(vectors[:, None], random(15, 1, vectors.shape[1], seed=seed))


def slow_map(vectors, rows, columns):
    """Kohonen's batch algorithm written out, with its sheet from an SVD."""
    points = [[float(v) for v in vector] for vector in vectors]
    h, n = len(points[0]), len(points)
    mean = vectors.mean(dim=0)
    _, lengths, components = torch.linalg.svd(vectors - mean, full_matrices=False)
    nodes = []
    for i in range(rows):
        for j in range(columns):
            node = mean.clone()
            for axis, (at, size) in enumerate(((j, columns), (i, rows))):
                component = components[axis]
                sign = 1 if component[component.abs().argmax()] > 0 else -1
                if size > 1:
                    span = 2 * at / (size - 1) - 1
                    node += span * sign * lengths[axis] / math.sqrt(n) * component
            nodes.append(node.tolist())
    first = max(max(rows, columns) / 2, 0.3)
    for epoch in range(50):
        width = first * (0.3 / first) ** (epoch / 49)
        nearest = [
            min(range(len(nodes)), key=lambda j: sum((p[d] - nodes[j][d]) ** 2 for d in range(h)))
            for p in points
        ]
        moved = []
        for j, node in enumerate(nodes):
            weights = []
            for winner in nearest:
                apart = (winner // columns - j // columns) ** 2
                apart += (winner % columns - j % columns) ** 2
                weights.append(math.exp(-apart / (2 * width**2)))
            total = sum(weights)
            moved.append(
                [
                    sum(w * p[d] for w, p in zip(weights, points, strict=True)) / total
                    for d in range(h)
                ]
                if total > 1e-12
                else node
            )
        nodes = moved
    return torch.tensor(nodes, dtype=torch.float64)


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (3, 2)])
def test_the_map_is_that_of_the_algorithm_written_out(grid):
    vectors = clusters(3, h=4, n=7)[0]
    torch.testing.assert_close(
        self_organizing_map(vectors, grid), slow_map(vectors, *grid), rtol=0, atol=1e-9
    )


def test_a_map_of_one_node_is_the_mean_difference():
    o = observed(clusters(4)[0])
    found = map_directions(o, 1, grid=(1, 1))
    assert found.shape == (1, 10)
    torch.testing.assert_close(found, estimate("mean_difference", o).vectors, rtol=0, atol=1e-12)


def test_the_nodes_find_the_clusters():
    vectors, centres = clusters(4)
    nodes = self_organizing_map(vectors, (2, 2))
    apart = torch.cdist(centres, nodes).min(dim=1).values
    assert apart.max() < 1.5  # of centres about 36 apart; neighbours on the map draw a little
    assert sorted(nearest_nodes(centres, nodes).tolist()) == [0, 1, 2, 3]


def test_a_map_is_deterministic_and_does_not_depend_on_the_order_of_prompts():
    vectors = clusters(5)[0]
    once, again = (self_organizing_map(vectors, (4, 4)) for _ in range(2))
    assert torch.equal(once, again)
    shuffled = vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(self_organizing_map(shuffled, (4, 4)), once, rtol=0, atol=1e-9)


def test_the_nodes_that_cover_most_come_first():
    """Written out: each next one leaves the least squared distance to the nearest."""
    vectors = clusters(3)[0]
    nodes = self_organizing_map(vectors, (3, 3))
    order = covering_order(nodes, vectors).tolist()
    winners = {min(range(9), key=lambda j: float((v - nodes[j]).norm())) for v in vectors}
    assert set(order) == winners

    def uncovered(chosen):
        return sum(min(float((v - nodes[j]).square().sum()) for j in chosen) for v in vectors)

    for i, node in enumerate(order):
        best = min(uncovered([*order[:i], j]) for j in winners - set(order[:i]))
        assert uncovered([*order[:i], node]) == pytest.approx(best, rel=1e-9)


def test_nodes_are_cleaned_as_directions_are():
    o = observed(clusters(4)[0])
    o = replace(o, protected={"code": moments_of(random(9, 1, 10, seed=2) + 3)})
    a = o.protected["code"].mean - o.contrast.mean
    mean = torch.nn.functional.normalize(o.contrast.mean, dim=1)
    protected = map_directions(o, 1, cleaning=Cleaning(ridge=0.0))
    assert (
        (protected @ a.T).abs().max()
        < 1e-9
        < (map_directions(observed(clusters(4)[0]), 1) @ a.T).abs().max()
    )
    projected = map_directions(replace(o, protected={}), 1, cleaning=Cleaning(projection=True))
    assert (projected @ mean.T).abs().max() < 1e-9


def test_nodes_that_depend_on_others_are_left_out():
    flat = clusters(5, h=3)[0]
    flat = torch.cat([flat, torch.zeros(len(flat), 7)], dim=1)  # in three dimensions
    o = Observations.of_vectors(flat[:, None], torch.zeros(4, 1, 10).double())
    found = map_directions(o, 1)
    assert len(found) == 3
    orthonormal_basis(found)  # raises for dependent directions


def test_stacks_by_name():
    o = observed(clusters(4)[0])
    o = replace(o, vectors={**o.vectors, "differences": random(11, 1, 10, seed=4)})
    directions = estimate("mean_difference", o)
    sources = Sources(o, directions, grid=(2, 2))
    som = subspace_of("som", sources, layers=[1], k=3)
    wanted = orthonormal_basis(map_directions(o, 1, grid=(2, 2))[:3])
    assert torch.equal(som.basis, wanted)
    assert som.layers == (1,)
    within = subspace_of("within_layer", sources, layers=[1], k=2)
    rows = within_layer(directions.vectors[0], o.vectors["differences"][:, 0])
    assert torch.equal(within.basis, orthonormal_basis(rows[:2]))
    plain = subspace_of("layers", sources, layers=[1], k=1)
    assert torch.equal(plain.basis, stack(directions, [1]).basis)
    assert subspace_of("per_layer", sources, layers=[1], k=1).basis.shape == (1, 10, 1)
    with pytest.raises(DirectionError, match=r"There are 4 independent directions .* k is 5"):
        subspace_of("som", sources, layers=[1], k=5)


# ---- one by one, and together


def product(units):
    matrix = torch.eye(units.shape[1], dtype=torch.float64)
    for unit in units:
        matrix = (torch.eye(len(unit)) - unit[:, None] * unit) @ matrix
    return matrix


def test_removal_one_by_one_is_the_product_of_the_removals():
    directions = random(4, 9)
    units = torch.nn.functional.normalize(directions, dim=1)
    left, right = sequential_removal(directions)
    assert left.shape == right.shape == (9, 4)
    torch.testing.assert_close(torch.eye(9) - left @ right.T, product(units), rtol=0, atol=1e-12)


def test_of_orthogonal_directions_one_by_one_is_together():
    q = orthonormal_basis(random(4, 9))
    left, right = sequential_removal(q.T)
    torch.testing.assert_close(left @ right.T, q @ q.T, rtol=0, atol=1e-12)
    assert left_behind(q.T).max() < 1e-12


def test_of_others_one_by_one_leaves_some_depends_on_the_order_and_is_no_projection():
    directions = random(3, 9) + 1.5
    units = torch.nn.functional.normalize(directions, dim=1)
    removed = product(units)
    torch.testing.assert_close(left_behind(directions), (units @ removed).norm(dim=1))
    assert left_behind(directions)[-1] < 1e-12
    assert left_behind(directions)[:-1].min() > 0.1
    assert not torch.allclose(removed @ removed, removed, atol=1e-2)
    assert not torch.allclose(product(units.flip(0)), removed, atol=1e-2)
    q = orthonormal_basis(directions)
    together = torch.eye(9) - q @ q.T
    assert (units @ together).abs().max() < 1e-12
    assert torch.linalg.matrix_norm(removed, 2) <= 1 + 1e-12  # it adds nothing
