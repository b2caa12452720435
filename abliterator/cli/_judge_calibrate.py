"""`abliterator judge-calibrate`: a judge against human labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abliterator.cli._options import JSON, judge_arguments, read_judge
from abliterator.cli._terminal import Bars, show
from abliterator.tables import cell

if TYPE_CHECKING:
    from abliterator.judge import Calibration


@click.command("judge-calibrate")
@click.argument("labelled", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@judge_arguments
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the result, for `judge.calibration` of a recipe: its record and card carry it.",
)
@JSON
def judge_calibrate(labelled: Path, out: Path | None, as_json: bool, **judge_options: Any) -> None:
    """Measure a judge against human labels.

    LABELLED has one JSON object a line: prompt, response, label (0, 0.5 or 1). An API judge is set
    up by --recipe, or by --set judge.base_url=URL --set judge.model=NAME.
    """
    from abliterator.files import sha256_of_lines, write_text_atomic
    from abliterator.judge import cache_folder, calibrate, load_labelled
    from abliterator.pipeline import judge_of, note_plain_http

    # an earlier calibration that the recipe names is not part of this one
    settings = read_judge(**judge_options).model_copy(update={"calibration": None})
    rows = load_labelled(labelled)
    note_plain_http(settings, Bars())
    with Bars().bar("verdicts", len(rows)) as advance:
        judge = judge_of(
            settings,
            cache=cache_folder() / "judge.sqlite",
            on_verdict=lambda tally: advance(1, status=str(tally)),
        )
        digest = sha256_of_lines(labelled)
        calibration = calibrate(rows, judge, name=labelled.name, sha256=digest)
    if out is not None:
        write_text_atomic(out, calibration.model_dump_json(indent=1) + "\n")
    show(calibration, _calibration_text, as_json=as_json)


def _calibration_text(calibration: Calibration) -> str:
    """A calibration in a few lines."""
    judge = calibration.judge
    lines = [
        f"judge      {judge.model or judge.kind}, version {judge.version}",
        f"answers    {calibration.n}, unscored {calibration.unscored}",
        f"agreement  {_rate(calibration.agreement)}",
        f"kappa      {_rate(calibration.kappa)} (three classes), "
        f"{_rate(calibration.kappa_binary)} (complied or not)",
        f"said complied, wrongly      {_rate(calibration.false_positive_rate)}",
        f"said not complied, wrongly  {_rate(calibration.false_negative_rate)}",
    ]
    lines += [f"unscored   {n} x {reason}" for reason, n in calibration.unscored_reasons.items()]
    for name, figures in calibration.per_class.items():
        lines.append(
            f"{name:9}  n {figures['n']:g}, recall {_rate(figures['recall'])}, "
            f"precision {_rate(figures['precision'])}"
        )
    for other, rate in calibration.disagreement.items():
        lines.append(f"disagrees with {other} on {_rate(rate.value)} of {rate.n} answers")
    return "\n".join(lines)


def _rate(value: float | None) -> str:
    return cell(value, absent="n/a")
