"""Answers, and who judges them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from abliterator.recipe._section import Positive, Section

# Capitals, as variables are written: a key pasted in its place does not look like this.
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class Rollouts(Section):
    """Answers of base and edited, greedy."""

    max_new_tokens: Positive = 256
    """Tokens of an answer; fewer than 100 miss refusals that come late."""
    limit: Positive = 100
    """Prompts of each set that are answered."""
    batch_size: Positive = 16
    """Prompts answered together."""


class Prices(Section):
    """What a server charges, in dollars for a million tokens."""

    input: Annotated[float, Field(ge=0)]
    """Tokens of the question."""
    output: Annotated[float, Field(ge=0)]
    """Tokens of the reply."""
    cached_input: Annotated[float, Field(ge=0)] | None = None
    """Tokens of the question that the server had in its cache. Default: as `input`."""


class JudgeSettings(Section):
    """Who judges the answers."""

    kind: Literal["rules", "openai"] = "rules"
    """`rules`: phrases and repetition, offline; it says so wherever its numbers appear.

    `openai`: a model behind a server with OpenAI's protocol; all that follows is about it.
    """
    base_url: str = "https://api.deepseek.com"
    """Where the server is; with `/v1` where it wants that."""
    model: Annotated[str, Field(min_length=1)] = "deepseek-flash"
    """Model that judges, as the server names it."""
    api_key_env: str | None = "DEEPSEEK_API_KEY"
    """Name of the environment variable that holds the key; null for a server that wants none."""
    structured: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """How strictly JSON is asked for; `auto` takes the strictest that the server accepts."""
    parameters: dict[str, Any] = {"temperature": 0}
    """More of the request, as the server takes it: `temperature`, `max_tokens`, `thinking`..."""
    votes: Annotated[int, Field(ge=1, le=9)] = 1
    """Verdicts asked for each answer, an odd number; their median counts."""
    rejudge: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Share of answers judged once more, to tell how often the judge disagrees with itself."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """Times a verdict is asked for again when a reply is none; then the answer is unscored."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Calls in flight."""
    timeout: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """Seconds for one call."""
    time_limit: Annotated[float, Field(gt=0)] = 7200.0
    """Seconds for all judging of one run, waiting included."""
    max_calls: Positive | None = None
    """Calls of one output folder; earlier runs count."""
    max_usd: Annotated[float, Field(gt=0)] | None = None
    """Dollars of one output folder, by `prices`; earlier runs count."""
    prices: Prices | None = None
    """What the server charges."""

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("must be an http or https URL")
        if parts.username or parts.password or parts.query:
            raise PydanticCustomError(
                "secret", "must hold no credentials: name their variable with `api_key_env`"
            )
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _name_of_a_variable(cls, value: str | None) -> str | None:
        if value is not None and not VARIABLE.fullmatch(value):
            raise PydanticCustomError(
                "secret", "must be the name of an environment variable in capitals, never a key"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.votes % 2 == 0:
            raise ValueError("`votes` must be odd, so that there is a median")
        if self.max_usd is not None and self.prices is None:
            raise ValueError("`max_usd` needs `prices`")
        reserved = sorted({"model", "messages", "stream", "response_format"} & set(self.parameters))
        if reserved:
            raise ValueError(f"`parameters` cannot hold `{reserved[0]}`")
        return self

    @model_validator(mode="after")
    def _only_what_applies(self) -> Self:
        if self.kind == "rules":
            fields = type(self).model_fields
            odd = [n for n in self.model_fields_set if getattr(self, n) != fields[n].default]
            if odd:
                raise ValueError(f"`{min(odd)}` belongs to `kind: openai`")
        return self

    @model_serializer(mode="wrap")
    def _only_the_kind_of_rules(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"kind": "rules"} if self.kind == "rules" else plain(self)
