"""`abliterator report`: one HTML file to look at a build, or to compare several."""

from __future__ import annotations

from pathlib import Path

import click

from abliterator.cli._options import FOLDER, NEW_FILE
from abliterator.cli._terminal import Bars, echo


@click.command(short_help="Write a page with answers side by side.")
@click.argument("folders", metavar="OUT...", nargs=-1, required=True, type=FOLDER)
@click.option("--out", type=NEW_FILE, help="The file.  [default: OUT/work/report.html]")
def report(folders: tuple[Path, ...], out: Path | None) -> None:
    """Write an HTML report on a build: answers side by side, layers, benchmarks, weights.

    Several OUTs make one report across models. It is one file that loads nothing from a network.
    It holds prompts and answers, so it is private: `publish` never takes it.
    """
    from abliterator import pipeline

    echo(pipeline.write_report(folders, out, progress=Bars()))
