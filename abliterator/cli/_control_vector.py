"""`abliterator control-vector`: the directions of a build, for llama.cpp to steer with."""

from __future__ import annotations

from pathlib import Path

import click

from abliterator.cli._options import NEW_FILE
from abliterator.cli._terminal import echo


@click.command(name="control-vector", short_help="Write a control vector for llama.cpp.")
@click.argument("out", type=click.Path(exists=True, path_type=Path))
@click.option("--out", "file", type=NEW_FILE, required=True, help="The GGUF file to write.")
@click.option(
    "--scale",
    type=float,
    default=-1.0,
    show_default=True,
    help="Of the mean difference: below 0 away from the behaviour, above 0 towards it.",
)
@click.option(
    "--layer",
    "layers",
    type=int,
    multiple=True,
    help="Residual layer, 2 or more; several add up.  [default: the build's first]",
)
def control_vector(out: Path, file: Path, scale: float, layers: tuple[int, ...]) -> None:
    """Write the directions of OUT as a control vector in GGUF, for llama.cpp.

    OUT is the folder of a build, its checkpoint, or abliterator/directions.safetensors of one.

    A control vector adds a constant after blocks, to the base, at run time: it steers. It does not
    remove what blocks write, so it is not the edit of the checkpoint; for that, convert the
    checkpoint itself to GGUF.
    """
    from abliterator.directions import load_directions, save_control_vector

    published = load_directions(out)
    chosen = layers or published.layers[:1]
    save_control_vector(file, published, layers=chosen, scale=scale)
    names = ", ".join(map(str, chosen))
    echo(f"{file}: {scale:g} x the mean difference of layer {names}, added after its block.")
    echo(f"llama-server -m BASE.gguf --control-vector {file}")
