"""A study as Markdown, for people."""

from __future__ import annotations

from collections.abc import Sequence

from abliterator.record import Agreement, ContrastDifference, Study, StudyRow
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
    if study.agreements:
        parts.append(_agreements(study.agreements))
    return "\n\n".join(parts) + "\n"


def _rows(rows: Sequence[StudyRow]) -> str:
    head = ["", "k", *(name.capitalize() for name in MEASURES), "KL, first token", "KL a token"]
    return markdown_table(
        head,
        [
            [
                row.name,
                str(len(row.layers)) if row.layers else "",
                *(cell(getattr(row.answers, name)) for name in MEASURES),
                *(
                    cell(getattr(row.divergence, name)) if row.divergence else ""
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
