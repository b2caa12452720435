"""The card's part on the edit, and on the choice of layers, directions and strengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from abliterator.card._markdown import (
    Markdown,
    Row,
    cell,
    escape,
    listed,
    number,
    row,
    settings,
    table,
)
from abliterator.card._origins import base_name
from abliterator.record import (
    AnswerSummary,
    Candidate,
    EditSummary,
    Estimate,
    QuantizedEdits,
    RunRecord,
    Selection,
    Stack,
    Trial,
    Tuning,
)

_PICTURES = {
    "abliterator/cosines.png": "Heatmap of the cosines between the directions of the layers",
    "abliterator/sweep.png": "Curves over the layers: bypass, KL, induce, compliance, coherence",
}
_MEASURED_ON_CHECKPOINT = Markdown(
    "**All figures below were measured on the edited checkpoint of the same run.** Merged into the "
    "base, this adapter gives that\ncheckpoint's weights, up to the rounding to their stored type."
)
_PLANNED = Markdown(
    "**This card was made before the recipe was run: nothing was built, and nothing was "
    "measured.** It shows what the recipe\nasks for."
)


def edit_variables(record: RunRecord, *, adapter: bool) -> dict[str, object]:
    """Variables of the template down to the choice of layers."""
    name, edit = base_name(record.model), record.edit
    directions = f"{edit.k} direction{'' if edit.k == 1 else 's'}"
    subject = f"This is {escape(name)} with {directions} removed from its weights."
    verify = "`abliterator verify .` compares every other byte with the base's."
    if adapter:
        rank = f"a LoRA of rank {edit.k}, for PEFT"
        subject = f"This adapter ({rank}) removes {directions} from the weights of {escape(name)}."
        verify = "`abliterator verify CHECKPOINT --adapter .` merges this adapter and compares."
    every = "Nothing was trained, and every" if record.tuning is None else "Every"
    return {
        "title": name.rpartition("/")[2],
        "ending": Markdown(": the adapter" if adapter else ""),
        "subject": Markdown(subject),
        "untouched": Markdown(every),
        "notices": [_MEASURED_ON_CHECKPOINT] * adapter + [_PLANNED] * (edit.tensors is None),
        "removed": _rows(edit),
        "verify_command": Markdown(verify),
        "choice": Markdown("\n\n".join(_choice(record))),
    }


def _rows(edit: EditSummary) -> Iterator[Row]:
    """Rows on what was removed from which weights; after the edit, also the leak and sizes."""
    planned = edit.tensors is None
    layers = Markdown("Left to a sweep") if planned and not edit.layers else listed(edit.layers)
    yield row("Residual layers the directions were taken at", layers)
    yield row("Token of the prompt (-1 is the last before the answer)", listed(edit.positions))
    yield row("Directions removed (k)", edit.k)
    yield row("Components edited", listed(edit.components))
    by_block = any(isinstance(strength, Mapping) for strength in edit.strength.values())
    note = " (by blocks, counted from 0; 0 in all others)" if by_block else ""
    yield row(
        "Strength s (1 removes, 0 leaves alone)", Markdown(f"{settings(edit.strength)}{note}")
    )
    yield from _experts(edit)
    yield row("Norm keeping", edit.norm)
    yield row("Rounding to the stored type", edit.rounding)
    if planned:
        return
    edited, written = number(edit.edited_bytes, ",d"), number(edit.output_bytes, ",d")
    yield row("Tensors edited", edit.tensors)
    yield row(
        "Bytes of the edited tensors, of all bytes of the checkpoint",
        Markdown(f"{edited} of {written}"),
    )
    yield row("Leak, largest of all edited tensors", number(edit.max_leak, ".1e"))
    yield row("Leak, median of all edited tensors", number(edit.median_leak, ".1e"))
    yield from map(_quantized, edit.quantized)


def _experts(edit: EditSummary) -> Iterator[Row]:
    if isinstance(edit.experts, Mapping):
        which = f"{settings(edit.experts)} (by blocks, counted from 0; in all others none)"
    elif edit.experts is not None:
        which = f"{listed(edit.experts)} of every block"
    else:
        return
    yield row("Routed experts edited", Markdown(which))


def _quantized(edits: QuantizedEdits) -> Row:
    stored = "Written as bfloat16" if edits.dequantized else "Kept in this format"
    measured = edits.max_leak, edits.noise, edits.noise_nearest
    leak, noise, nearest = (number(value, ".1e") for value in measured)
    return row(
        f"{escape(edits.format)}: {edits.tensors} edited tensors",
        Markdown(
            f"{stored}; leak at most {leak}, rounding noise {noise} of the weights ({nearest} by "
            "plain rounding)"
        ),
    )


def _choice(record: RunRecord) -> Iterator[str]:
    """How layers, number of directions and strengths were chosen: paragraphs and tables."""
    if record.selection is not None:
        yield from _selection(record.selection)
        yield from (
            f"![{_PICTURES[path]}]({path})" for path in _PICTURES if path in record.pictures
        )
    elif record.edit.layers or record.edit.tensors is not None:
        yield "The layers are those that the recipe names."
    else:
        yield "The layers are for a sweep to find."
    if record.tuning is not None:
        yield from _tuning(record.tuning)


def _selection(selection: Selection) -> Iterator[str]:
    if selection.candidates:
        yield from _sweep(selection.candidates)
    else:
        yield (
            "The layers are those that the recipe names; how many of them are stacked was measured."
        )
    if selection.stacks:
        yield from _stacks(selection.stacks)
    structure = selection.structure
    yield (
        f"Structure of the behaviour in this model: {escape(structure.verdict)}. The directions "
        "of the best layers have a\n"
        f"participation ratio of {number(structure.participation_ratio, '.2f')} (1: they are "
        "all the same; n: n layers have n orthogonal ones)."
    )


def _sweep(candidates: Sequence[Candidate]) -> Iterator[str]:
    layers = {candidate.layer for candidate in candidates}
    positions = {candidate.position for candidate in candidates}
    several = len(positions) > 1
    tokens = f" at {len(positions)} tokens that follow the prompt" if several else ""
    yield (
        f"The layers were chosen by a sweep over {len(layers)} layers{tokens}, on prompts that are "
        "not among those measured below:\n"
        "first by how much removing a layer's direction lowers the log-odds of a refusal (bypass), "
        "how far it moves answers to neutral\n"
        "prompts (KL, nats a token) and how much adding it raises those log-odds (induce); then, "
        "for the best, by judged answers, of which\n"
        "those that did worst on few prompts gave no more.\n"
        "`abliterator/record.json` has every candidate; these were judged:"
    )
    place_columns = ("Layer", "Token") if several else ("Layer",)
    rows = [
        (
            candidate.layer,
            *((candidate.position,) if several else ()),
            *(number(getattr(candidate, score)) for score in ("bypass", "kl", "induce")),
            *_grades(candidate.answers),
            _n(candidate.answers),
        )
        for candidate in candidates
        if candidate.answers is not None
    ]
    grades = ("Compliance", "Coherence", "Compliance x coherence")
    yield table(rows, *place_columns, "Bypass", "KL", "Induce", *grades, "n")


def _grades(answers: AnswerSummary) -> tuple[Markdown, ...]:
    return tuple(_value(e) for e in (answers.compliance, answers.coherence, answers.product))


def _value(estimate: Estimate | None) -> Markdown:
    """A value without its interval; what is withheld says so."""
    return Markdown("withheld") if estimate is None else number(estimate.value)


def _n(result: AnswerSummary | Trial) -> int | Markdown:
    return result.product.n if result.product else Markdown("")


def _stacks(stacks: Sequence[Stack]) -> Iterator[str]:
    draws, largest = stacks[0].draws, stacks[-1]
    mean = f" (of either, the mean of {cell(draws)} draws)" if draws > 1 else ""
    of_one_layer = (
        " (directions of one layer: its mean difference, then principal components of the paired "
        "differences)"
        if len(largest.layers) < largest.k
        else ""
    )
    yield (
        "A larger stack is taken while its 95 % intervals against the smaller one, against as many "
        "random directions and against as many of\n"
        f"shuffled labels{mean} lie above 0{of_one_layer}; a control at\n"
        "a KL above the stack's and above the gate has broken the model, and does not count:"
    )
    rows = [
        (
            stack.k,
            number(stack.kl),
            *_grades(stack.answers),
            _gain(stack.over_smaller, None),
            _gain(stack.over_random, stack.random_kl),
            _gain(stack.over_shuffled, stack.shuffled_kl),
            _n(stack.answers),
        )
        for stack in stacks
    ]
    yield table(
        rows,
        *("k", "KL", "Compliance", "Coherence", "Compliance x coherence"),
        *("Against the smaller stack", "Against random directions", "Against shuffled labels"),
        "n",
    )


def _gain(gain: Estimate | None, kl: float | None) -> Markdown:
    """A difference with its interval, and the KL of what it was compared with; else empty."""
    if gain is None:
        return Markdown("")
    bounds = ""
    if gain.low is not None and gain.high is not None:
        bounds = f" [{number(gain.low, '+.3f')}, {number(gain.high, '+.3f')}]"
    against = "" if kl is None else f" at KL {number(kl)}"
    return Markdown(f"{number(gain.value, '+.3f')}{bounds}{against}")


def _tuning(tuning: Tuning) -> Iterator[str]:
    yield (
        "From there strengths, directions or both were tuned by gradients, on "
        f"{cell(tuning.preference_pairs)} target prompts that the base refuses and\n"
        "that the plain edit answers, against the divergence on neutral prompts; the strengths "
        "above are means, and `abliterator/edits.json`\n"
        "has each tensor's. Every point below was judged on target prompts that nothing was "
        "learned from; the first is the plain edit. None of\n"
        "these prompts is among those measured below."
    )
    rows = [
        (
            _mark(trial, selected=index == tuning.selected),
            _value(trial.refusal),
            _value(trial.product),
            _n(trial),
            number(trial.kl, ".4f"),
            number(trial.kl_first_token, ".4f"),
        )
        for index, trial in enumerate(tuning.trials)
    ]
    yield table(
        rows,
        *("", "Refusal", "Compliance x coherence", "n", "KL on neutral prompts, nats a token"),
        "of the first token",
    )


def _mark(trial: Trial, *, selected: bool) -> Markdown:
    return Markdown("**taken**" if selected else "on the front" if trial.on_front else "")
