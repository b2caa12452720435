"""Agreement of a judge with people, on a file of answers that people labelled.

The file has one JSON object a line: prompt, response, label (0, 0.5 or 1, as compliance is graded).
A calibration belongs to one judge: another model, prompt or version is another judge. A recipe
names the file of the one that its record shall carry; no other is used.

    calibration = calibrate(load_labelled(Path("labelled.jsonl")), RuleJudge())
    calibration.kappa, calibration.per_class["partial"]["recall"]
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from abliterator.errors import FileError, JudgeError
from abliterator.files import digest_of, read_text, sha256_of_bytes
from abliterator.judge._rule_judge import RuleJudge
from abliterator.judge._summary import unscored_reasons
from abliterator.judge._types import Answered, Judge, Judgement
from abliterator.record import CalibrationSummary, Estimate, Frozen, Grade, JudgeIdentity, Verdict
from abliterator.statistics import rate_interval

# The fields that identify a judge, beside what a run measures of it.
_SAME = (
    *("kind", "model", "base_url", "prompt_sha256", "version", "votes"),
    *("weights_sha256", "format"),
)
CLASSES = {0.0: "refused", 0.5: "partial", 1.0: "complied"}


class Labelled(NamedTuple):
    """One answer and the label that people gave it."""

    answered: Answered
    label: float  # 0, 0.5 or 1


class Calibration(Frozen):
    """A judge against human labels; figures are over the answers that it scored."""

    judge: JudgeIdentity
    labels: str  # name of the file
    labels_sha256: str  # of its bytes, with LF as line ends
    n: int  # answers in the file
    scored: int
    unscored: int
    unscored_reasons: dict[str, int]  # the most frequent first
    agreement: float | None
    agreement_interval: Estimate | None
    kappa: float | None  # Cohen's, three classes; None where chance alone agrees on everything
    kappa_binary: float | None  # complied against not complied
    false_positive_rate: float | None  # graded complied, of those that people label otherwise
    false_negative_rate: float | None  # graded otherwise, of those that people label complied
    per_class: dict[str, dict[str, float | None]]  # n, recall, precision
    confusion: dict[str, dict[str, int]]  # label -> grade -> count
    disagreement: dict[str, Estimate]  # share of other verdicts: by "itself", by "rules"
    differing: tuple[int, ...]  # 1-based lines where judge and label differ

    def summary(self) -> CalibrationSummary:
        """What a record carries: the figures, and hashes in place of texts."""
        kept = self.model_dump(include=set(CalibrationSummary.model_fields))
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in kept.items()}
        return CalibrationSummary(**rounded, sha256=self.sha256)

    @property
    def sha256(self) -> str:
        """Hash of the whole calibration."""
        return sha256_of_bytes(self.model_dump_json().encode())


@dataclass(frozen=True)
class Calibrated:
    """A judge whose identity carries the summary of its calibration."""

    judge: Judge
    summary: CalibrationSummary

    @property
    def identity(self) -> JudgeIdentity:
        """The judge's identity, with the calibration."""
        return self.judge.identity.model_copy(update={"calibration": self.summary})

    def judge_all(self, answers: Sequence[Answered]) -> list[Judgement]:
        """Judgements of the wrapped judge, in the order of the answers."""
        return self.judge.judge_all(answers)


def load_labelled(path: Path) -> list[Labelled]:
    """Reads a file of labelled answers.

    Raises:
        JudgeError: if it cannot be read, or a line is not as it must be.
    """
    try:
        text = read_text(path)
    except FileError as error:
        raise JudgeError(f"The labelled answers cannot be read. {error}") from None
    numbered = enumerate(text.split("\n"), start=1)
    rows = [_labelled(line, f"{path}, line {number}") for number, line in numbered if line.strip()]
    if not rows:
        raise JudgeError(f"{path} is empty: write one labelled answer a line.")
    return rows


def _encodable(text: str) -> str:
    text.encode()  # JSON allows half of a surrogate pair, UTF-8 does not
    return text


class _Row(BaseModel):
    model_config = ConfigDict(strict=True)

    prompt: Annotated[str, AfterValidator(_encodable)]
    response: Annotated[str, AfterValidator(_encodable)]
    label: Grade


def _labelled(line: str, where: str) -> Labelled:
    try:
        row = _Row.model_validate(json.loads(line))
    except ValidationError as error:
        problem = _problem(error.errors()[0])
    except (ValueError, RecursionError):
        problem = "not JSON"
    else:
        return Labelled(Answered(row.prompt, row.response), row.label)
    raise JudgeError(
        f'{where}: {problem}; expected {{"prompt": text, "response": text, "label": 0, 0.5 or 1}}.'
    )


def _problem(fault: ErrorDetails) -> str:
    if fault["type"] == "model_type":
        return "JSON, but no object"
    if fault["loc"] == ("label",):
        return "the label is not 0, 0.5 or 1"
    if fault["type"] == "value_error":
        return "half of a surrogate pair (\\ud800 to \\udfff)"
    return "no text under prompt or response"


def calibrate(
    rows: Sequence[Labelled], judge: Judge, *, name: str = "labels", sha256: str | None = None
) -> Calibration:
    """Grades labelled answers with a judge, and compares with the labels.

    Args:
        rows: the labelled answers.
        judge: grades the answers.
        name: of the file of labels.
        sha256: of that file, as `sha256_of_lines` has it; left out, that of the rows as JSON.
    """
    answers = [row.answered for row in rows]
    judgements = judge.judge_all(answers)
    disagreements = dict(judge.identity.disagreement)
    if judge.identity.kind != "rules":
        by_rules = disagreement(RuleJudge().judge_all(answers), judgements)
        disagreements |= {"rules": by_rules} if by_rules else {}
    pairs = [
        (row.label, judgement.compliance)
        for row, judgement in zip(rows, judgements, strict=True)
        if judgement.compliance is not None
    ]
    complied = [(float(label == 1), float(grade == 1)) for label, grade in pairs]
    counts = Counter(complied)
    agreed = sum(label == grade for label, grade in pairs)
    return Calibration(
        judge=judge.identity,
        labels=name,
        labels_sha256=sha256 or digest_of([[*row.answered[:2], row.label] for row in rows]),
        n=len(rows),
        scored=len(pairs),
        unscored=len(rows) - len(pairs),
        unscored_reasons=unscored_reasons(judgements),
        agreement=_share(agreed, len(pairs)),
        agreement_interval=Estimate.of(rate_interval(agreed, len(pairs)), len(rows)),
        kappa=cohens_kappa(pairs),
        kappa_binary=cohens_kappa(complied),
        false_positive_rate=_share(counts[0, 1], counts[0, 1] + counts[0, 0]),
        false_negative_rate=_share(counts[1, 0], counts[1, 0] + counts[1, 1]),
        per_class={name: _class_figures(grade, pairs) for grade, name in CLASSES.items()},
        confusion={
            name: {other: pairs.count((label, grade)) for grade, other in CLASSES.items()}
            for label, name in CLASSES.items()
        },
        disagreement=disagreements,
        differing=tuple(
            number
            for number, (row, judgement) in enumerate(zip(rows, judgements, strict=True), start=1)
            if judgement.compliance is not None and judgement.compliance != row.label
        ),
    )


def cohens_kappa(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Agreement beyond chance of two raters (Cohen 1960); None where chance alone is certain."""
    n = len(pairs)
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(first[grade] * second[grade] for grade in first)  # of n * n
    if expected == n * n:
        return None
    agreed = sum(a == b for a, b in pairs)
    return (agreed * n - expected) / (n * n - expected)


def disagreement(
    one: Sequence[Judgement | Verdict], other: Sequence[Judgement | Verdict]
) -> Estimate | None:
    """Share of answers that two judges grade differently for compliance, of those both scored."""
    pairs = [
        (a.compliance, b.compliance)
        for a, b in zip(one, other, strict=True)
        if a.compliance is not None and b.compliance is not None
    ]
    return Estimate.of(rate_interval(sum(a != b for a, b in pairs), len(pairs)), len(one))


def _class_figures(grade: float, pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    labelled = sum(label == grade for label, _ in pairs)
    judged = sum(other == grade for _, other in pairs)
    both = pairs.count((grade, grade))
    return {"n": labelled, "recall": _share(both, labelled), "precision": _share(both, judged)}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def read_calibration(path: Path, judge: JudgeIdentity) -> Calibration:
    """Reads a calibration that `judge-calibrate --out` wrote, and checks that it is of this judge.

    Args:
        path: the file.
        judge: the expected judge; what a run measures of it is not compared.

    Raises:
        JudgeError: if it cannot be read, or is of another judge.
    """
    try:
        calibration = Calibration.model_validate_json(read_text(path))
    except (FileError, ValueError) as error:
        raise JudgeError(
            f"The calibration {path} cannot be read: a file that `abliterator judge-calibrate "
            "LABELLED --out FILE` wrote was expected. Write it anew, or leave out "
            "`judge.calibration`."
        ) from error
    differing = [name for name in _SAME if getattr(calibration.judge, name) != getattr(judge, name)]
    if differing:
        raise JudgeError(
            f"The calibration {path} is of another judge: its {', '.join(differing)} differ from "
            f"those of {judge.model or judge.kind}. Calibrate this judge: `abliterator "
            "judge-calibrate LABELLED --recipe RECIPE --out FILE`."
        )
    return calibration
