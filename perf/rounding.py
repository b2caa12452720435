"""Compensated against nearest rounding in bfloat16: how much less leaks, for how much more noise.

    python perf/rounding.py              # Gaussian weights, random directions
    python perf/rounding.py --seeds 10

The leak is |Qᵀ W'| / |Qᵀ W| of the stored numbers; noise is |stored - exact|, Frobenius. Each row
is the worst of the seeds. `least` is a bound (the least of the seeds): no choice of roundings that
leaks nothing, whoever finds it, makes less noise.
"""

from __future__ import annotations

import argparse
import time

import torch

from abliterator.formats import FORMATS
from abliterator.subspace import ablate, compensate, compensating_rows, orthonormal_basis

WIDTHS, RANKS, COLUMNS = (128, 256, 576, 2048), (1, 4, 16), 256


def measure(width: int, k: int, seed: int) -> tuple[float, float, float, float, float]:
    """Leaks of nearest and compensated rounding, noise over nearest's, its bound, seconds."""
    rounded = FORMATS["BF16"].rounded
    chance = torch.Generator().manual_seed(seed)
    basis = orthonormal_basis(torch.randn(k, width, generator=chance))
    weight = rounded(0.02 * torch.randn(width, COLUMNS, generator=chance))
    q = basis.float()
    exact = ablate(weight, q, 1.0)
    nearest, ours, rows = rounded(exact), rounded(exact), compensating_rows(q)
    started = time.perf_counter()
    ours[rows] = compensate(
        exact[rows], q.T @ (nearest - exact), q[rows], lambda numbers, *_, **__: rounded(numbers)
    )
    seconds = time.perf_counter() - started
    wrote, plain, left = ((basis.T @ w.double()).norm() for w in (weight, nearest, ours))
    least = float((nearest - exact).norm())
    noise = float((ours - exact).norm()) / least
    bound = least_noise(exact, q) / least
    return float(plain / wrote), float(left / wrote), noise, bound, seconds


def least_noise(exact: torch.Tensor, q: torch.Tensor) -> float:
    """Noise that every choice of roundings without a leak makes, at least.

    Lagrange's dual: for any a, |stored - exact|^2 with Q^T(stored - exact) = 0 is no less than
    |stored - moved|^2 - |Q a|^2, moved = exact - Q a, and that is least where `stored` is `moved`
    rounded to nearest. It is concave in a, column by column; what Q reads is its slope.

    Args:
        exact: [H, c].
        q: [H, k], orthonormal.
    """
    a = torch.zeros(q.shape[1], exact.shape[1])
    bound = torch.zeros(exact.shape[1])
    for step in range(300):
        moved = exact - q @ a
        stored = FORMATS["BF16"].rounded(moved)
        value = (stored - moved).square().sum(dim=0) - (q @ a).square().sum(dim=0)
        bound = bound.maximum(value)
        a += q.T @ (stored - exact) / (1 + step) ** 0.5
    return float(bound.sum().sqrt())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    print("    H    k  nearest   compensated   less by   noise   least   us a column")
    for width in WIDTHS:
        for k in RANKS:
            found = [measure(width, k, seed) for seed in seeds]
            plain, left, _, _, seconds = min(found, key=lambda row: row[0] / row[1])
            noise, least = max(row[2] for row in found), min(row[3] for row in found)
            print(
                f"{width:5} {k:4}  {plain:.1e}       {left:.1e}  1/{plain / left:<6.0f}"
                f"   {noise:.3f}   {least:.3f}   {1e6 * seconds / COLUMNS:11.0f}"
            )


if __name__ == "__main__":
    main()
