"""`abliterator init`: a first recipe of a model."""

from __future__ import annotations

from pathlib import Path

import click

from abliterator.cli._options import NEW_FILE
from abliterator.cli._terminal import echo
from abliterator.errors import OutputError


@click.command(short_help="Write a recipe for a model.")
@click.argument("model")
@click.option(
    "--out",
    type=NEW_FILE,
    help="File to write; it must not exist.  [default: stdout]",
)
@click.option("--full", is_flag=True, help="Every other key too, as a comment with its default.")
def init(model: str, out: Path | None, full: bool) -> None:
    """Write a recipe for MODEL: a Hub id, a folder, or embedded:demo.

    It is made from config and headers alone. Layers, k and strengths are left to measurement.
    """
    from abliterator import pipeline
    from abliterator.files import write_text_atomic

    if out is not None and out.exists():
        raise OutputError(
            f"{out} exists, and a first recipe replaces nothing. Choose another --out."
        )
    text = pipeline.first_recipe(pipeline.plan_model(model, out or Path.cwd()), full=full)
    if out is None:
        echo(text, nl=False)
    else:
        write_text_atomic(out, text)
        echo(out)
