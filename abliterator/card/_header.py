"""The YAML header of a card: values of a known shape only; a strange one is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from abliterator.record import Estimate, RunRecord

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TAGS = ("abliterated", "abliterator", "not-for-all-audiences")
HUB_ID = re.compile(r"(?=.{1,96}\Z)(?!.*(--|\.\.))(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}", re.ASCII)
LICENSE_LINK = re.compile(r"(https://)?[\w.][\w./%-]{0,199}", re.ASCII)
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8}){0,2}", re.ASCII)
PLAIN_NAME = re.compile(r"\w[\w.,-]{0,63}", re.ASCII)
# Half of a 95 % interval is so many standard errors.
_ERRORS_IN_HALF = 1.96


def header(record: RunRecord) -> str:
    """The header, without its two rules."""
    from huggingface_hub import ModelCardData

    model = record.model
    base = model.id if model.revision is not None and HUB_ID.fullmatch(model.id) else None
    results = list(_results(record))
    license_id = _fitting(LICENSE_ID, (model.license or "").lower())
    data = ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base else None,
        license=license_id,  # the Hub's licence ids are lower case
        license_name=_fitting(LICENSE_ID, (model.license_name or "").lower()),
        license_link=_fitting(LICENSE_LINK, model.license_link),
        language=[code for code in model.languages if LANGUAGE.fullmatch(code)] or None,
        datasets=_datasets(record) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        # no results are None: an empty list would become an empty model-index
        eval_results=results or None,
        model_name=f"{(base or 'model').rpartition('/')[2]}-abliterated" if results else None,
    )
    return data.to_yaml()


def _fitting(pattern: re.Pattern[str], text: str | None) -> str | None:
    return text if text is not None and pattern.fullmatch(text) else None


def _datasets(record: RunRecord) -> list[str]:
    """Hub datasets that prompts came from, each once."""
    sources = [origin.source for origin in record.provenance.prompts if origin.revision is not None]
    return [source for source in dict.fromkeys(sources) if HUB_ID.fullmatch(source)]


def _results(record: RunRecord) -> Iterator[EvalResult]:
    """Benchmarks of the edited model; the base's, and the paired deltas, are in the tables."""
    from huggingface_hub import EvalResult

    for task, result in record.benchmarks.items():
        if PLAIN_NAME.fullmatch(task) and PLAIN_NAME.fullmatch(result.metric):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=task,
                dataset_name=f"{task} (lm-eval)",
                metric_type=result.metric,
                metric_value=round(result.edited.value, 4),
                metric_args={"n": result.edited.n, **_standard_error(result.edited)},
            )


def _standard_error(measured: Estimate) -> dict[str, float]:
    if measured.low is None or measured.high is None:
        return {}
    return {"stderr": round((measured.high - measured.low) / 2 / _ERRORS_IN_HALF, 4)}
