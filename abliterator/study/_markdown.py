"""A study as Markdown, for people."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from abliterator.record import (
    Agreement,
    ContrastDifference,
    DirectionCosines,
    EditDifference,
    NullDistribution,
    Study,
    StudyRow,
)
from abliterator.tables import cell, markdown_table

MEASURES = ("refusal", "compliance", "coherence", "product")


def to_markdown(study: Study) -> str:
    """The question, the settings, and tables of `value [95 % interval] (n=40)`."""
    about = "; ".join(f"{name} {_plain(value)}" for name, value in study.about.items())
    parts = [f"# {study.name}: {study.asks}", *([about + "."] if about else [])]
    if study.rows:
        parts.append(_rows(study.rows))
    if study.differences:
        parts += ["Paired less generic, on the same prompts:", _differences(study.differences)]
    if study.edit_differences:
        parts += [
            f"Less {study.compared_with} at the same factor of the strengths, paired by prompt:",
            _edit_differences(study.edit_differences),
        ]
    if study.cosines:
        parts += [f"Cosines with {study.compared_with}:", _cosines(study.cosines)]
    if study.agreements:
        parts.append(_agreements(study.agreements))
    if study.nulls:
        parts += ["The edit among draws that owe nothing to the behaviour:", _nulls(study.nulls)]
    return "\n\n".join(parts) + "\n"


def _rows(rows: Sequence[StudyRow]) -> str:
    head = ["", "k", *(name.capitalize() for name in MEASURES), "KL, first token", "KL a token"]
    return markdown_table(
        head,
        [
            [
                row.name,
                str(row.k or len(row.layers) or ""),
                *(cell(getattr(row.answers, name)) for name in MEASURES),
                *(
                    cell(getattr(row.divergence, name), ".4f") if row.divergence else ""
                    for name in ("kl_first_token", "kl")
                ),
            ]
            for row in rows
        ],
    )


def _differences(differences: Sequence[ContrastDifference]) -> str:
    return markdown_table(
        ["Layer", "Cosine", *(name.capitalize() for name in MEASURES)],
        [
            [
                str(difference.layer),
                f"{difference.cosine:.3f}",
                *(cell(getattr(difference.delta, name), "+.3f") for name in MEASURES),
            ]
            for difference in differences
        ],
    )


def _edit_differences(differences: Sequence[EditDifference]) -> str:
    head = ["", *(name.capitalize() for name in MEASURES), "KL, first token", "KL a token"]
    return markdown_table(
        head,
        [
            [
                difference.name,
                *(cell(getattr(difference.delta, name), "+.3f") for name in MEASURES),
                cell(difference.kl_first_token, "+.4f"),
                cell(difference.kl, "+.4f"),
            ]
            for difference in differences
        ],
    )


def _cosines(cosines: Sequence[DirectionCosines]) -> str:
    by_layer = zip(*(column.cosines for column in cosines), strict=True)
    return markdown_table(
        ["Layer", *(column.name for column in cosines)],
        [
            [str(layer), *(f"{cosine:.3f}" for cosine in row)]
            for layer, row in enumerate(by_layer, start=1)
        ],
    )


def _nulls(nulls: Sequence[NullDistribution]) -> str:
    return markdown_table(
        ["Drawn", "Draws", "Prompts", "Statistic", "Mean", "Largest", "The edit", "p"],
        [
            [
                null.of,
                str(len(null.values)),
                str(null.prompts),
                f"mean {null.statistic}",
                f"{mean(null.values):.3f}",
                f"{max(null.values):.3f}",
                f"{null.observed:.3f}",
                f"{null.p_value:.3g}",
            ]
            for null in nulls
        ],
    )


def _agreements(agreements: Sequence[Agreement]) -> str:
    return markdown_table(
        ["Layer", "1 - cosine", "Length", "Cosine of two halves of the prompts"],
        [
            [
                str(agreement.layer),
                cell(agreement.apart, ".1e"),
                f"{agreement.length:.6f}",
                f"{agreement.halves:.4f}",
            ]
            for agreement in agreements
        ],
    )


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
