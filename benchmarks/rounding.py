"""Compensated against nearest rounding in bfloat16: how much less leaks, for how much more noise.

    python benchmarks/rounding.py              # Gaussian weights, random directions
    python benchmarks/rounding.py --seeds 10

The leak is |Qᵀ W'| / |Qᵀ W| of the stored numbers; noise is |stored - exact|, Frobenius. Each row
is the worst of the seeds.
"""

from __future__ import annotations

import argparse
import time

import torch

from abliterator.formats import FORMATS
from abliterator.subspace import ablate, compensate, compensating_rows, orthonormal_basis

WIDTHS, RANKS, COLUMNS = (256, 576, 2048), (1, 4, 16), 256


def measure(width: int, k: int, seed: int) -> tuple[float, float, float, float]:
    """Leak of nearest rounding, leak of compensated, noise of one over the other, seconds."""
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
    noise = (ours - exact).norm() / (nearest - exact).norm()
    return float(plain / wrote), float(left / wrote), float(noise), seconds


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    print("    H    k  nearest   compensated   less by   noise   us a column")
    for width in WIDTHS:
        for k in RANKS:
            found = [measure(width, k, seed) for seed in seeds]
            plain, left, _, seconds = min(found, key=lambda row: row[0] / row[1])
            noise = max(row[2] for row in found)
            print(
                f"{width:5} {k:4}  {plain:.1e}       {left:.1e}  1/{plain / left:<6.0f}"
                f"   {noise:.3f}   {1e6 * seconds / COLUMNS:11.0f}"
            )


if __name__ == "__main__":
    main()
