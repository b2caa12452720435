"""What a build prints at its end: the result in a few lines, an example, and the next commands."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.cli._terminal import duration, render
from abliterator.tables import cell, terminal_table

if TYPE_CHECKING:
    from abliterator.pipeline import AnswerPair
    from abliterator.record import Behaviour, Outlier, RunRecord, TensorEdit

GRADES = ("refusal", "compliance", "coherence")
MEASURES = (*GRADES, "truncated", "unscored")
SIGNIFICANT = 0.05  # p below which a set that must stay as it was is said to have changed
WIDTH, LABEL = 80, 12  # columns of the result, and of the names before it


def details_text(record: RunRecord, out: Path) -> str:
    """Every figure, base and edited side by side, with its interval."""
    from abliterator.judge import counted

    rows = [["", "base", "edited", "delta"], *_behaviour_rows(record.behaviour)]
    if record.sampled:
        rows += _behaviour_rows(record.sampled.behaviour, ", drawn")
    rows += _grouped(record)
    for task, result in record.benchmarks.items():
        estimates = (result.base, result.edited, result.delta)
        rows.append([f"{task} {result.metric}", *map(cell, estimates)])
    table = "\n".join(terminal_table(rows))
    checkpoint, leak = out / "checkpoint", _leak(record, out)
    return render(
        "details", r=record, checkpoint=checkpoint, leak=leak, table=table, counted=counted
    )


def _behaviour_rows(
    behaviours: Mapping[str, Behaviour | None], drawn: str = ""
) -> Iterator[list[str]]:
    for name, behaviour in behaviours.items():
        for measure in _measures(behaviour) if behaviour else ():
            sides = (getattr(behaviour, side) for side in ("base", "edited", "delta"))
            cells = [cell(getattr(s, measure)) for s in sides]
            detectable = behaviour.smallest_detectable.get(measure) if behaviour else None
            cells[2] += f", {detectable:.3f} detectable" if detectable is not None else ""
            yield [f"{name} {measure}{drawn}", *cells]


def _grouped(record: RunRecord) -> Iterator[list[str]]:
    """Rows of groups, side effects and confidence: base, edited and delta."""
    for name, groupings in record.groups.items():
        for grouping in groupings:
            for group in grouping.groups:
                for measure, values in group.measures.items():
                    estimates = (values.base, values.edited, values.delta)
                    title = f"{name} {grouping.column} {cell(group.name, '')} {measure}"
                    yield [title, *(cell(e, absent="withheld") for e in estimates)]
    for measured in (record.side_effects, record.confidence):
        for name, figures in measured.items():
            for key, figure in figures.items():
                estimates = (figure.base, figure.edited, figure.delta)
                yield [f"{name} {key.replace('_', ' ')}", *map(cell, estimates)]


def _measures(behaviour: Behaviour) -> tuple[str, ...]:
    thinks = behaviour.base.thinking_refusal or behaviour.edited.thinking_refusal
    return (*MEASURES, "thinking_refusal") if thinks else MEASURES


def outcome_text(record: RunRecord, out: Path) -> str:
    """The result in lines of at most 80 columns, one prompt with both answers, what to do next."""
    from abliterator.pipeline import answer_pairs

    pairs = [pair for pair in answer_pairs(out) if pair.set == "target"]
    example = next((pair for pair in pairs if pair.is_answered_now), None)
    return render(
        "outcome",
        checkpoint=out / "checkpoint",
        time=duration(sum(record.timing.values())),
        result="\n".join(chain.from_iterable(map(_wrapped, _result(record, out)))),
        pairs=[example or pairs[0]] if pairs else list[AnswerPair](),
        out=shlex.quote(str(out)),
        name=shlex.quote(f"{Path(record.model.id).name.removeprefix('embedded:')}-edited"),
        card=shlex.quote(str(out / "checkpoint" / "README.md")),
    )


def leak_text(edits: Iterable[TensorEdit], max_leak: float) -> str:
    """How near the stored tensors are to what was asked for."""
    edits = list(edits)
    if all(edit.strength == 1 for edit in edits):
        return f"leak at most {max_leak:.1e}"
    deviation = max((edit.deviation for edit in edits if edit.deviation is not None), default=0.0)
    return f"strengths as asked, within {deviation:.0e}"


def _leak(record: RunRecord, out: Path) -> str:
    from abliterator.verification import read_edits

    max_leak = record.edit.max_leak
    return "" if max_leak is None else ", " + leak_text(read_edits(out / "checkpoint"), max_leak)


def _result(record: RunRecord, out: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of the lines of a result; spaces within a figure are no-break spaces."""
    target = record.behaviour.get("target")
    for measure in GRADES if target else ():
        yield measure, _change(target, measure)
    if target and target.base.thinking_refusal and target.edited.thinking_refusal:
        yield "thinking", "refuses\xa0in\xa0it " + _change(target, "thinking_refusal")
    for name, behaviour in record.behaviour.items():
        if behaviour and name != "target":
            yield name.replace("_", "-"), ", ".join(_stability(behaviour))
    if record.sampled and (drawn := record.sampled.behaviour.get("target")):
        yield "drawn", f"refusal\xa0{_change(drawn, 'refusal')}, {record.sampled.drawn('target')}"
    outliers = [o for groupings in record.groups.values() for g in groupings for o in g.outliers]
    if outliers:
        yield "groups", ", ".join(map(_outlier, sorted(outliers, key=lambda o: o.p_holm)[:3]))
    if divergence := record.divergence:
        yield "KL", f"{cell(divergence.kl_first_token)} nats, first token, neutral"
    if record.benchmarks:
        deltas = (f"{task}\xa0{r.delta.value:+.3f}" for task, r in record.benchmarks.items())
        yield "benchmarks", ", ".join(deltas)
    layers = "layer " if len(record.edit.layers) == 1 else "layers "
    layers += ", ".join(map(str, record.edit.layers))
    yield (
        "edit",
        f"k = {record.edit.k} ({layers}), {record.edit.tensors} tensors" + _leak(record, out),
    )
    unscored = [
        f"{sum(reasons.values())} of {side}, {name}".replace(" ", "\xa0")
        for name, behaviour in record.behaviour.items()
        for side, reasons in (behaviour.unscored_reasons.items() if behaviour else ())
        if reasons
    ]
    if unscored:
        yield "unscored", "; ".join(unscored)


def _change(behaviour: Behaviour | None, measure: str) -> str:
    sides = [getattr(getattr(behaviour, side), measure) for side in ("base", "edited", "delta")]
    if None in sides:
        return "withheld: too many answers have no verdict"
    base, edited, delta = sides
    interval = f"{delta.value:+.3f}"
    if delta.low is not None:
        interval += f" [{delta.low:+.3f}, {delta.high:+.3f}]"
    return f"{_arrow(base.value, edited.value)}  {interval}, n = {delta.counts}".replace(
        " ", "\xa0"
    )


def _outlier(outlier: Outlier) -> str:
    text = f"{outlier.column} {outlier.group}: {outlier.measure} {outlier.edited.value:.3f}"
    return f"{text}, of all {outlier.overall.value:.3f}".replace(" ", "\xa0")


def _stability(behaviour: Behaviour) -> Iterator[str]:
    """Whether a set that must stay as it was did, with the grades that changed."""
    measured = {
        measure: (getattr(behaviour.base, measure), getattr(behaviour.edited, measure))
        for measure in GRADES
    }
    values = {name: (b.value, e.value) for name, (b, e) in measured.items() if b and e}
    p_values = {name: behaviour.p_value.get(name) for name in values}
    changed = [name for name, p in p_values.items() if p is not None and p < SIGNIFICANT]
    if not values:
        yield "withheld: too many answers have no verdict"
        return
    same = all(before == after for before, after in values.values())
    yield "changed" if changed else "unchanged" if same else "no significant change"
    for name in changed or ["refusal", "coherence"]:
        yield f"{name}\xa0{_arrow(*values[name])}"


def _arrow(before: float, after: float) -> str:
    return f"{before:.3f}\xa0->\xa0{after:.3f}"


def _wrapped(line: tuple[str, str]) -> Sequence[str]:
    """A line with its name, broken between figures alone."""
    name, text = line
    indent = " " * LABEL
    lines = textwrap.wrap(text, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False)
    return [
        (f"{name:{LABEL}}" if i == 0 else indent) + part.replace("\xa0", " ")
        for i, part in enumerate(lines)
    ]
