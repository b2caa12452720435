"""`abliterator init`: a first recipe of a model."""

from __future__ import annotations

from pathlib import Path

import click

from abliterator.cli._options import NEW_FILE
from abliterator.cli._terminal import echo
from abliterator.errors import OutputError


@click.command()
@click.argument("model")
@click.option(
    "--out",
    type=NEW_FILE,
    help="File to write; it must not exist.  [default: stdout]",
)
def init(model: str, out: Path | None) -> None:
    """Write a commented recipe for MODEL: a Hub id, a folder, or embedded:demo.

    It is made from config and headers alone. Layers and k are left to measurement; every other key
    stands there as a comment, with its default.
    """
    from abliterator import pipeline
    from abliterator.files import write_text_atomic

    if out is not None and out.exists():
        raise OutputError(
            f"{out} exists, and a first recipe replaces nothing. Choose another --out."
        )
    text = pipeline.first_recipe(pipeline.plan_model(model, out or Path.cwd()))
    if out is None:
        echo(text, nl=False)
    else:
        write_text_atomic(out, text)
        echo(out)
