"""How results and progress look in a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.cli._print import echo, printable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from abliterator.pipeline import Advance, Plan, Reproduction
    from abliterator.record import Estimate, RunRecord


MEASURES = ("refusal", "compliance", "coherence", "truncated", "unscored")


def planned(plan: Plan) -> str:
    """A plan in a few lines."""
    summary = plan.summary()
    size = {name: _size(count) for name, count in summary["bytes"].items()}
    memory = {name: _size(summary[f"{name}_memory"]) for name in ("bake", "model")}
    edited = ", ".join(f"{n} {component}" for component, n in summary["edited_tensors"].items())
    lines = [
        f"model        {summary['model']} ({summary['model_type']}, {summary['n_layers']} layers, "
        f"d_model {summary['d_model']})",
        *([f"layers       {summary['layers']}, k = {summary['k']}"] if summary["k"] else []),
        *([_selecting(summary, plan.selection)] if plan.selection else []),
        *([_tuning(plan.tuning)] if plan.tuning else []),
        *(
            f"writers      {_found(component, counts, summary)}"
            for component, counts in summary["writers"].items()
        ),
        f"edit         {edited or 'nothing'} tensors; {summary['untouched_tensors']} untouched",
        *_storage(summary),
        f"bytes        read {size['read']}, edited {size['edited']}, written {size['written']}; "
        f"{size['free']} free",
        f"memory       {memory['bake']} to bake, beside Python's and torch's own; where the model "
        f"runs, {memory['model']} for its weights as they are stored",
        f"carried      {', '.join(summary['files']['carried'])}",
        f"left out     {', '.join(summary['files']['left_out']) or 'nothing'}",
        *(f"note         {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def _size(count: int) -> str:
    """Bytes as people read them, to three digits or more."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.{3 if unit > 10**6 else 1}f} {name}"
    return f"{count} bytes"


def _found(component: str, counts: Mapping[str, int], summary: Mapping[str, Any]) -> str:
    where = f" in {counts['blocks']} of {summary['n_layers']} blocks" if counts["blocks"] else ""
    if component == "embedding" and summary["tied_embeddings"]:
        where = ", the output head too (tied)"
    experts = f", {summary['n_experts']} experts a block" if component == "expert" else ""
    edited = "all" if counts["edited"] == counts["tensors"] else counts["edited"] or "none"
    found = f"{counts['tensors']} of {counts['expected']} tensors"
    return f"{component}: {found}{where}{experts}; {edited} edited"


def _storage(summary: Mapping[str, Any]) -> list[str]:
    lines = [f"stored as    {', '.join(f'{n} {name}' for name, n in summary['formats'].items())}"]
    if summary["through_gains"]:
        lines.append(
            f"norms        {summary['through_gains']} edits go through the gain of a norm that "
            "follows"
        )
    for told in summary["quantised"]:
        lines.append(f"quantised    {told['tensors']} tensors: {told['format']}; {told['way']}:")
        lines += [_way(way, told[way]) for way in ("keep", "dequantize")]
    lines += [f"left alone   {n} tensors: {label}" for label, n in summary["left_alone"].items()]
    return lines if summary["formats"] else lines[1:]


def _way(way: str, told: Mapping[str, Any]) -> str:
    size = _size(told["bytes"])
    if told["leak"] is None:
        return f"             {way}: {size} of weights; leak and noise not measured before"
    return (
        f"             {way}: {size} of weights, leak about {told['leak']:.0e}, noise "
        f"{told['noise']:.1%} of the weights (constants, k = {told['k']})"
    )


def _selecting(summary: Mapping[str, Any], cost: Mapping[str, int]) -> str:
    n = cost["candidates"]
    what = f"sweep of {n} layers" if n else f"the first of {summary['layers']}"
    places = " at every position after the prompt" if cost["every_position"] else ""
    grown = f", k found with {cost['stacks']} sizes" if cost["stacks"] else ""
    answers = f"about {cost['answers']} answers, {cost['tokens']} tokens in all"
    return (
        f"selection    {what}{places}{grown}; at most {cost['judged']} candidates judged on up to "
        f"{cost['prompts']} prompts: {answers}"
    )


def _tuning(cost: Mapping[str, int]) -> str:
    return (
        f"tuning       {cost['steps']} steps by gradients; {cost['points']} points judged, each on "
        f"{cost['answers_a_point']} answers of {cost['tokens']} tokens at most"
    )


def told(record: RunRecord, out: Path) -> str:
    """What was measured, base and edited side by side."""
    lines = [f"{out / 'checkpoint'}: {record.edit.tensors} tensors edited, k = {record.edit.k}"]
    if record.edit.max_leak is not None:
        lines[0] += f", leak at most {record.edit.max_leak:.1e}"
    rows = [["", "base", "edited", "delta"]]
    for name, behaviour in record.behaviour.items():
        for measure in MEASURES if behaviour else ():
            sides = (getattr(behaviour, side) for side in ("base", "edited", "delta"))
            cells = [_shown(getattr(s, measure)) for s in sides]
            seen = behaviour.smallest_detectable.get(measure) if behaviour else None
            cells[2] += f", {seen:.3f} detectable" if seen is not None else ""
            rows.append([f"{name} {measure}", *cells])
    for task, result in record.benchmarks.items():
        estimates = (result.base, result.edited, result.delta)
        rows.append([f"{task} {result.metric}", *map(_shown, estimates)])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines += _unscored(record)
    kl = record.divergence.kl_first_token if record.divergence else None
    lines.append(f"first-token KL on neutral prompts, nats: {_shown(kl)}")
    judged = record.judge.model or record.judge.kind if record.judge else "nobody"
    for other, rate in record.judge.disagreement.items() if record.judge else ():
        lines.append(f"the judge disagrees with {other} on: {_shown(rate)}")
    lines.append(f"judged by: {judged}")
    return "\n".join(line.rstrip() for line in lines)


def _unscored(record: RunRecord) -> list[str]:
    """Why answers have no verdict, a line for each set and side that has such answers."""
    from abliterator.judge import counted

    return [
        f"{name}, {side}: unscored {counted(reasons)}"
        for name, behaviour in record.behaviour.items()
        for side, reasons in (behaviour.unscored_reasons if behaviour else {}).items()
        if reasons
    ]


def _shown(estimate: Estimate | None) -> str:
    return "not measured" if estimate is None else f"{estimate:.3f}"


def reproduced(found: Reproduction) -> str:
    """How a rebuilt checkpoint compares with the published one."""
    whole = found.same + len(found.different)
    lines = [f"{found.same} of {whole} edited tensors are the published ones to the last bit"]
    if found.different:
        lines.append(f"different   {', '.join(found.different[:3])}...")
        lines += [f"published, rebuilt   {reason}" for reason in found.reasons]
        lines += [] if found.reasons else ["nothing recorded differs between the two builds"]
    return "\n".join(lines)


def json_of(value: BaseModel) -> str:
    """A typed result as JSON in ASCII, which is the same in every encoding of stdout."""
    return json.dumps(json.loads(value.model_dump_json()), indent=1)


class Bars:
    """Draws the pipeline's progress on stderr."""

    def stage(self, name: str, *, done: bool) -> None:
        """One line a stage."""
        echo(f"{name}{' (done before)' if done else ''}", err=True)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """A tqdm bar that vanishes when it is full; none where stderr is a file."""
        from tqdm import tqdm

        label, here = f"  {printable(label)}", sys.stderr
        with tqdm(total=total, desc=label, leave=False, file=here, disable=None) as bar:

            def advance(amount: int, *, status: str = "") -> None:
                if status:
                    bar.set_postfix_str(printable(status), refresh=False)
                bar.update(amount)

            yield advance

    def note(self, text: str) -> None:
        """A line of its own."""
        echo(text, err=True)
