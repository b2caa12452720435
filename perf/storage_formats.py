"""What each quantised format keeps of an edit, and what it costs: leak, noise and bytes.

    python perf/storage_formats.py [--d-model 2048] [--k 1 3 16] [--formats int4_group nvfp4]

Makes one block of a random model in every format (with few columns: each is edited alone), removes
a random subspace of rank k from it, keeping the format (by plain and by compensated rounding) and
writing bfloat16, and prints what was measured on the stored bytes of the writers that were
quantised; bytes are of the whole file. `own` is what the format itself
rounded away of the weights that it was made from, which no edit brings back. The table in
`abliterator/formats/measured.yaml` is `--d-model 2048`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from abliterator.anatomy import anatomy_of
from abliterator.bake import bake, plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.formats import mxfp4_numbers, mxfp4_scales
from abliterator.recipe import Edit
from abliterator.subspace import orthonormal_basis
from tests.helpers.packed import PACKED, reference
from tests.helpers.quantised import BLOCK, FORMATS, expanded, mxfp4, save_mxfp4, save_quantised

WAYS = {
    "keep, nearest": {"quantized": "keep", "rounding": "nearest"},
    "keep": {"quantized": "keep"},
    "dequantize": {"quantized": "dequantize"},
}


def own_noise(name: str, d_model: int) -> float:
    """|stored - W| / |W| of normal weights."""
    weight = torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(2))
    weight = weight.mul_(d_model**-0.5).bfloat16().float()
    if name in PACKED:
        stored = reference(name, PACKED[name].quantise(weight))
    elif name == "mxfp4":
        blocks, exponents = mxfp4(weight.T[None])
        stored = mxfp4_numbers(blocks[0]) * mxfp4_scales(exponents[0])
    else:
        numbers, scale = FORMATS[name].quantise(weight)
        step = (BLOCK, BLOCK) if scale.ndim == 2 and scale.shape[1] > 1 else None
        unit = scale.float() if step is None else expanded(scale.float(), weight.shape, step)
        stored = numbers.float() * unit
    return float((stored - weight).norm() / weight.norm())


def measure(folder: Path, out: Path, k: int, settings: dict[str, str]) -> tuple[float, ...]:
    """Largest leak, noise over |W|, over plain rounding's, and bytes of all weight files."""
    checkpoint = Checkpoint.open(folder)
    anatomy = anatomy_of(checkpoint.config)
    plan = plan_edits(checkpoint, anatomy, Edit(**settings))
    directions = torch.randn(k, anatomy.d_model, generator=torch.Generator().manual_seed(3))
    edits = bake(checkpoint, plan, orthonormal_basis(directions), out)
    edits = [edit for edit in edits if edit.storage]
    noise, nearest = (
        (sum(getattr(edit, kind) ** 2 for edit in edits) / len(edits)) ** 0.5
        for kind in ("noise", "noise_nearest")
    )
    leak = max(edit.leak for edit in edits)
    return leak, noise, noise / nearest, Checkpoint.open(out).total_bytes


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3, 16])
    names = [*FORMATS, "mxfp4", *PACKED]
    parser.add_argument("--formats", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| format (own noise) | way | k | leak | noise / |W| | noise / nearest's | MB |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.formats:
        own = own_noise(name, arguments.d_model)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "base"
            sizes = {"d_model": arguments.d_model, "n_layers": 1}
            if name == "mxfp4":
                save_mxfp4(folder, **sizes)
            else:
                save_quantised(name, folder, **sizes)
            for k in arguments.k:
                for way, settings in WAYS.items():
                    leak, noise, ratio, size = measure(folder, Path(temporary) / "out", k, settings)
                    print(
                        f"| {name} ({own:.4f}) | {way} | {k} | {leak:.1e} | {noise:.2e} | "
                        f"{ratio:.2f} | {size / 1e6:.1f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
