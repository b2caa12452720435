"""`abliterator judge-calibrate`: a judge against human labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from abliterator.cli._options import (
    FILE,
    JSON,
    NEW_FILE,
    computing_arguments,
    judge_arguments,
    read_judge,
    recipe_model,
)
from abliterator.cli._terminal import Bars, render, show


@click.command("judge-calibrate")
@click.argument("labelled", type=FILE)
@judge_arguments
@computing_arguments
@click.option(
    "--out",
    type=NEW_FILE,
    help="Write the result, for `judge.calibration` of a recipe: its record and card carry it.",
)
@JSON
def judge_calibrate(
    labelled: Path,
    out: Path | None,
    as_json: bool,
    device: str,
    dtype: str,
    max_memory: int | None,
    **judge_options: Any,
) -> None:
    """Measure a judge against human labels.

    LABELLED has one JSON object a line: prompt, response, label (0, 0.5 or 1). An API judge is set
    up by --recipe, or by --set judge.base_url=URL --set judge.model=NAME; a model of this process
    by --judge local --set judge.model=ID-OR-FOLDER.
    """
    from abliterator.files import cache_folder, sha256_of_lines, write_text_atomic
    from abliterator.judge import calibrate, load_labelled
    from abliterator.pipeline import JudgeHost, Options, judge_of, note_plain_http

    # an earlier calibration that the recipe names is not part of this one
    settings = read_judge(**judge_options).model_copy(update={"calibration": None})
    rows = load_labelled(labelled)
    note_plain_http(settings, Bars())
    options = Options(device, dtype, max_memory)
    host = JudgeHost(options, recipe_model(judge_options["recipe"]), note=Bars().note)
    with Bars().bar("verdicts", len(rows)) as advance:
        judge = judge_of(
            settings,
            cache=cache_folder() / "judge.sqlite",
            on_verdict=lambda tally: advance(1, status=str(tally)),
            host=host,
        )
        digest = sha256_of_lines(labelled)
        calibration = calibrate(rows, judge, name=labelled.name, sha256=digest)
    if out is not None:
        write_text_atomic(out, calibration.model_dump_json(indent=1) + "\n")
    show(calibration, lambda c: render("calibration", c=c), as_json=as_json)
