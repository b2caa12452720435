"""How results and progress look in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from abliterator.pipeline import Advance, Plan
    from abliterator.record import Estimate, RunRecord


def planned(plan: Plan) -> str:
    """A plan in a few lines."""
    summary = plan.summary()
    size = {name: f"{count / 1e9:.3f} GB" for name, count in summary["bytes"].items()}
    edited = ", ".join(f"{n} {component}" for component, n in summary["edited_tensors"].items())
    lines = [
        f"model        {summary['model']} ({summary['model_type']}, {summary['n_layers']} layers, "
        f"d_model {summary['d_model']})",
        *([f"layers       {summary['layers']}, k = {summary['k']}"] if summary["k"] else []),
        f"edit         {edited or 'nothing'} tensors; {summary['untouched_tensors']} untouched",
        f"bytes        read {size['read']}, edited {size['edited']}, written {size['written']}; "
        f"{size['free']} free",
        f"bake memory  {summary['bake_memory'] / 1e6:.0f} MB",
        f"carried      {', '.join(summary['files']['carried'])}",
        f"left out     {', '.join(summary['files']['left_out']) or 'nothing'}",
    ]
    return "\n".join(lines)


def told(record: RunRecord, out: Path) -> str:
    """What was measured, base and edited side by side."""
    lines = [f"{out / 'checkpoint'}: {record.edit.tensors} tensors edited, k = {record.edit.k}"]
    if record.edit.max_leak is not None:
        lines[0] += f", leak at most {record.edit.max_leak:.1e}"
    rows = [["", "base", "edited", "delta"]]
    for name, behaviour in record.behaviour.items():
        for measure in ("refusal", "compliance", "coherence") if behaviour else ():
            sides = (getattr(behaviour, side) for side in ("base", "edited", "delta"))
            rows.append([f"{name} {measure}", *(_shown(getattr(s, measure)) for s in sides)])
    for task, result in record.benchmarks.items():
        estimates = (result.base, result.edited, result.delta)
        rows.append([f"{task} {result.metric}", *map(_shown, estimates)])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    kl = record.divergence.kl_first_token if record.divergence else None
    lines.append(f"first-token KL on neutral prompts, nats: {_shown(kl)}")
    judged = record.judge.model or record.judge.kind if record.judge else "nobody"
    lines.append(f"judged by: {judged}")
    return "\n".join(line.rstrip() for line in lines)


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not measured"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f} (n={estimate.n})"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}] (n={estimate.n})"


class Bars:
    """Draws the pipeline's progress on stderr."""

    def stage(self, name: str, *, done: bool) -> None:
        """One line a stage."""
        click.echo(f"{name}{' (done before)' if done else ''}", err=True)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """A tqdm bar that vanishes when it is full; none where stderr is a file."""
        from tqdm import tqdm

        label, here = f"  {label}", sys.stderr
        with tqdm(total=total, desc=label, leave=False, file=here, disable=None) as bar:

            def advance(amount: int, *, status: str = "") -> None:
                if status:
                    bar.set_postfix_str(status, refresh=False)
                bar.update(amount)

            yield advance

    def note(self, text: str) -> None:
        """A line of its own."""
        click.echo(text, err=True)
