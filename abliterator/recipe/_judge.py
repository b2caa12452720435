"""Settings of answers and of the judge."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from abliterator.recipe._section import Positive, Section
from abliterator.recipe._server import ServerSettings

_OF_SAMPLES = {"temperature", "top_p", "seed"}


class Rollouts(Section):
    """Answers of the base and the edited model: greedy ones, and beside them drawn ones."""

    max_new_tokens: Positive = 256
    """Tokens of an answer, at most; below 100, late refusals are missed.

    Without `thinking_tokens`, those of the thinking before it are among them.
    """
    thinking_tokens: Positive | None = None
    """Tokens of a reasoning model's thinking, at most: a budget of its own, so that answers are
    reached; then `max_new_tokens` are those of the answer behind it.

    Thinking beyond it is not closed by force: the answer counts as truncated.
    """
    limit: Positive = 100
    """Prompts of each set that are answered."""
    batch_size: Positive | Literal["auto"] = "auto"
    """Prompts answered together; halved where they do not fit in a GPU's memory.

    `auto`: as many as memory holds beside the weights, on a GPU 512 at most, on a CPU 16 to 64;
    on other devices 16.
    """
    samples: Annotated[int, Field(ge=0, le=100)] = 0
    """Answers drawn for each prompt beside the greedy one: how often users meet a refusal.

    They need as much time each as the greedy answers. The next three keys belong to them.
    """
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.7
    """Temperature at which answers are drawn."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Tokens are drawn from the smallest set of likeliest ones that has this probability."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawn answers, the same whatever the batches; a server draws by its own rules."""

    @model_validator(mode="after")
    def _samples_are_drawn(self) -> Self:
        fields = type(self).model_fields
        changed = [name for name in _OF_SAMPLES if getattr(self, name) != fields[name].default]
        if changed and not self.samples:
            raise ValueError(f"`{min(changed)}` belongs to `samples`: set `samples` too")
        return self

    @model_serializer(mode="wrap")
    def _dump_given(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without later keys that are not given: recipes of before them keep their digests."""
        absent = set() if self.samples else {"samples", *_OF_SAMPLES}
        absent |= set() if self.thinking_tokens else {"thinking_tokens"}
        return {key: value for key, value in plain(self).items() if key not in absent}

    @property
    def greedy(self) -> Rollouts:
        """The settings of the greedy answers alone."""
        return self.model_copy(update={"samples": 0})

    @property
    def most_tokens(self) -> int:
        """Tokens that may be generated for one prompt, thinking included."""
        return self.max_new_tokens + (self.thinking_tokens or 0)

    @property
    def most_thinking(self) -> int:
        """Tokens of the thinking before an answer, at most."""
        return self.thinking_tokens or self.max_new_tokens


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
