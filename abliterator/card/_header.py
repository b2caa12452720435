"""The YAML header of a card: values of the expected form only; any other is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import sqrt
from typing import TYPE_CHECKING, Any

from abliterator.card._markdown import without_invisible
from abliterator.record import BenchmarkResult, RunRecord

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TAGS = ("abliterated", "abliterator", "not-for-all-audiences")
HUB_ID = re.compile(r"(?=.{1,96}\Z)(?!.*(--|\.\.))(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}", re.ASCII)
LICENSE_LINK = re.compile(r"(https://)?[\w.][\w./%-]{0,199}", re.ASCII)
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8}){0,2}", re.ASCII)
PLAIN_NAME = re.compile(r"\w[\w.,-]{0,63}", re.ASCII)
# Half of a 95 % interval is so many standard errors.
_ERRORS_IN_HALF = 1.96
GATING_TEXTS = tuple(
    f"extra_gated_{x}" for x in ("prompt", "heading", "description", "button_content")
)
GATING_FIELDS = "extra_gated_fields"


def header(record: RunRecord, *, adapter: bool) -> str:
    """The YAML of the header, without its `---` lines.

    An adapter's has no results, which were measured on the checkpoint.
    """
    from huggingface_hub import ModelCardData

    base, relation = hub_base(record), "adapter" if adapter else "finetune"
    # no results are None: an empty list would become an empty model-index
    results = (None if adapter else list(_results(record))) or None
    data = ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        **_terms(record),
        datasets=_datasets(record) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, "lora"] if adapter else list(TAGS),
        eval_results=results,
        model_name=f"{(base or 'model').rpartition('/')[2]}-abliterated" if results else None,
        **_gating(record.model.gating),
    )
    return data.to_yaml()


def hub_base(record: RunRecord) -> str | None:
    model = record.model
    return model.id if model.revision is not None and HUB_ID.fullmatch(model.id) else None


def _terms(record: RunRecord) -> dict[str, Any]:
    """Licence and languages of the base."""
    model = record.model
    return {
        # the Hub's licence ids are lower case
        "license": _fitting(LICENSE_ID, (model.license or "").lower()),
        "license_name": _fitting(LICENSE_ID, (model.license_name or "").lower()),
        "license_link": _fitting(LICENSE_LINK, model.license_link),
        "language": [code for code in model.languages if LANGUAGE.fullmatch(code)] or None,
    }


def _fitting(pattern: re.Pattern[str], text: str | None) -> str | None:
    return text if text is not None and pattern.fullmatch(text) else None


def _gating(gating: Mapping[str, Any]) -> dict[str, Any]:
    """Keys `extra_gated_*` of a gated base, whose texts the Hub shows to those who want access."""
    texts = {key: gating[key] for key in GATING_TEXTS if isinstance(gating.get(key), str)}
    fields = gating.get(GATING_FIELDS)
    if isinstance(fields, dict) and all(isinstance(kind, (str, dict)) for kind in fields.values()):
        texts[GATING_FIELDS] = fields
    visible: dict[str, Any] = without_invisible(texts)
    return visible


def _datasets(record: RunRecord) -> list[str]:
    """Hub datasets that prompts came from, each once."""
    sources = [origin.source for origin in record.provenance.prompts if origin.revision is not None]
    return [source for source in dict.fromkeys(sources) if HUB_ID.fullmatch(source)]


def _results(record: RunRecord) -> Iterator[EvalResult]:
    """Benchmarks of the edited model; the base's, and the paired deltas, are in the tables."""
    from huggingface_hub import EvalResult

    for task, result in record.benchmarks.items():
        by_rules = "conversation_suite" in result.settings
        if PLAIN_NAME.fullmatch(task) and PLAIN_NAME.fullmatch(result.metric):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=task,
                dataset_name=f"{task} ({'abliterator' if by_rules else 'lm-eval'})",
                metric_type=result.metric,
                metric_value=round(result.edited.value, 4),
                metric_args={"n": result.edited.n, **_standard_error(result)},
            )


def _standard_error(result: BenchmarkResult) -> dict[str, float]:
    """Of the edited model's mean; none where all documents are alike, for 0 would say too much.

    Where each document is right or wrong it follows from the mean: sqrt(p (1 - p) / (n - 1)), as in
    lm-eval. For other metrics the interval is a bootstrap's, whose half is 1.96 standard errors.
    """
    edited = result.edited
    if edited.low is None or edited.high is None or edited.n < 2:
        return {}
    if result.gained is None:
        error = (edited.high - edited.low) / 2 / _ERRORS_IN_HALF
    else:
        error = sqrt(max(0.0, edited.value * (1 - edited.value)) / (edited.n - 1))
    return {"stderr": round(error, 4)} if error > 0 else {}


def with_license(card: str, license_id: str) -> str:
    """The text of a card with a licence in its header, where it has none."""
    from huggingface_hub import ModelCard

    parsed = ModelCard(card, ignore_metadata_errors=False)
    parsed.data["license"] = parsed.data.get("license") or license_id
    return str(parsed)


def stated_license(card: str) -> str | None:
    """The licence in the header of a card, anybody's; None where none can be read."""
    from yaml import YAMLError, safe_load

    if not card.startswith("---\n"):
        return None
    try:
        head = safe_load(card.split("\n---\n", 1)[0])
    except (YAMLError, ValueError, RecursionError):
        return None
    stated = head.get("license") if isinstance(head, dict) else None
    return stated if isinstance(stated, str) else None
