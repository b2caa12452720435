"""Settings of answers and of the judge."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from abliterator.recipe._section import Positive, Section
from abliterator.recipe._server import ServerSettings


class Rollouts(Section):
    """Greedy answers of the base and the edited model."""

    max_new_tokens: Positive = 256
    """Tokens of an answer, at most; below 100, late refusals are missed."""
    limit: Positive = 100
    """Prompts of each set that are answered."""
    batch_size: Positive | Literal["auto"] = "auto"
    """Prompts answered together; halved where they do not fit in a GPU's memory.

    `auto`: 64 on a GPU, else 16.
    """


BASE = "base"  # as a judge's model: the recipe's own
JudgeFormat = Literal[
    "auto", "labels", "wildguard", "llama_guard_3", "llama_guard_4", "qwen3guard", "harmbench",
    "strongreject",
]  # fmt: skip
_EVERY, _LOCAL = {"kind", "calibration"}, {"model", "revision", "format"}


class JudgeSettings(ServerSettings):
    """The judge of the answers.

    `calibration` belongs to every kind; `model`, `revision` and `format` to `kind: local`; all keys
    but the last two to `kind: openai`.
    """

    section: ClassVar[str] = "judge"

    kind: Literal["rules", "openai", "local"] = "rules"
    """`rules`: phrases and repetition, offline; its name stands wherever its numbers appear.

    `openai`: a model behind a server with OpenAI's protocol.

    `local`: `model` in this process, an instruct or guard model. Its labels are the most probable
    of those allowed, so that every answer gets one.
    """
    model: Annotated[str, Field(min_length=1)] = "deepseek-flash"
    """Model, as the server names it; of a local judge its Hub id or folder, or `base`: the model
    that is edited, before the edit."""
    revision: str | None = None
    """Commit of a local judge on the Hub. Default: the build resolves it once and records it."""
    format: JudgeFormat = "auto"
    """How a local judge is asked: `labels`, the rubric of this tool; or the format that a guard
    was trained for.

    `auto`: by the model's name.
    """
    votes: Annotated[int, Field(ge=1, le=9)] = 1
    """Verdicts requested for each answer, an odd number; their median counts."""
    rejudge: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Share of answers judged a second time, to measure how often the judge disagrees with
    itself."""
    calibration: str | None = None
    """File that `abliterator judge-calibrate LABELLED --out FILE` wrote of this judge, relative to
    the recipe: record and card carry its figures, and the name and sha256 of its labels.
    """

    @property
    def is_base(self) -> bool:
        """Whether the model that is edited judges."""
        return self.kind == "local" and self.model == BASE

    @model_validator(mode="after")
    def _median_exists(self) -> Self:
        if self.votes % 2 == 0:
            raise ValueError("`votes` must be odd, so that there is a median")
        return self

    @model_validator(mode="after")
    def _only_what_applies(self) -> Self:
        fields = type(self).model_fields
        changed = {n for n in self.model_fields_set if getattr(self, n) != fields[n].default}
        applicable = {
            "rules": _EVERY,
            "local": _EVERY | _LOCAL,
            "openai": fields.keys() - {"revision", "format"},
        }[self.kind]
        if inapplicable := changed - applicable:
            name = min(inapplicable)
            owner = "local" if name in ("revision", "format") else "openai"
            raise ValueError(f"`{name}` belongs to `kind: {owner}`")
        if self.kind == "local" and "model" not in changed:
            raise ValueError(
                "`kind: local` needs `model`: a Hub id, a folder, or `base` for the recipe's own"
            )
        if self.is_base and self.revision is not None:
            raise ValueError("`revision` of the judge `base` is the recipe's own")
        return self

    @model_serializer(mode="wrap")
    def _dump_applicable(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = plain(self)
        calibration = values.pop("calibration", None)
        if self.kind == "rules":
            values = {"kind": "rules"}
        elif self.kind == "local":
            values = {"kind": "local", **{name: values[name] for name in sorted(_LOCAL)}}
        else:
            for name in ("revision", "format"):
                values.pop(name, None)
        return values if calibration is None else {**values, "calibration": calibration}
