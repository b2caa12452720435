"""Settings of a model behind a server with OpenAI's protocol, and its budget."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from abliterator.recipe._secrets import plain_url, without_secrets
from abliterator.recipe._section import Positive, Section

# Capitals, as variables are written: a key pasted in its place does not look like this.
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
RESERVED = {"model", "messages", "stream", "response_format"}  # of a request: ours to set


def name_of_variable(value: str | None) -> str | None:
    """The value, if it is the name of an environment variable in capitals, or None.

    Raises:
        ValueError: if it is none. The error does not quote it: it may be a key.
    """
    if value is not None and not VARIABLE.fullmatch(value):
        raise PydanticCustomError(
            "secret", "must be the name of an environment variable in capitals, never a key"
        )
    return value


PlainUrl = Annotated[str, AfterValidator(plain_url)]
PlainSettings = Annotated[dict[str, Any], AfterValidator(without_secrets)]


class Prices(Section):
    """What a server charges, in dollars for a million tokens."""

    input: Annotated[float, Field(ge=0)]
    """Tokens of the question."""
    output: Annotated[float, Field(ge=0)]
    """Tokens of the reply."""
    cached_input: Annotated[float, Field(ge=0)] | None = None
    """Tokens of the question that the server had in its cache. Default: as `input`."""


class ServerSettings(Section):
    """Address of a model server, and how requests are made."""

    section: ClassVar[str] = "server"  # what a file calls these settings

    base_url: PlainUrl = "https://api.deepseek.com"
    """Address of the server, with `/v1` if the server needs it."""
    model: Annotated[str, Field(min_length=1)] = "deepseek-flash"
    """Model, as the server names it."""
    api_key_env: str | None = "DEEPSEEK_API_KEY"
    """Name of the environment variable that holds the key; null for a server that wants none."""
    structured: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """Response format requested; `auto` uses the strictest that the server accepts."""
    parameters: PlainSettings = {"temperature": 0}
    """Further request parameters of the server: `temperature`, `max_tokens`, `thinking`..."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """Repeated requests after an unusable reply; then there is no result."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Calls in flight."""
    timeout: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """Seconds for one call."""
    time_limit: Annotated[float, Field(gt=0)] = 7200.0
    """Seconds for one run, waiting included."""
    max_calls: Positive | None = None
    """Calls for one output; earlier runs count."""
    max_usd: Annotated[float, Field(gt=0)] | None = None
    """Dollars for one output, by `prices`; earlier runs count."""
    prices: Prices | None = None
    """What the server charges."""

    @property
    def url_key(self) -> str:
        """Dotted key of the recipe that holds the address."""
        return f"{self.section}.base_url"

    @property
    def model_key(self) -> str:
        """Dotted key of the recipe that holds the model's name."""
        return f"{self.section}.model"

    @field_validator("api_key_env")
    @classmethod
    def _name_of_a_variable(cls, value: str | None) -> str | None:
        return name_of_variable(value)

    @model_validator(mode="after")
    def _server_fits_together(self) -> Self:
        if self.max_usd is not None and self.prices is None:
            raise ValueError("`max_usd` needs `prices`")
        reserved = sorted(RESERVED & set(self.parameters))
        if reserved:
            raise ValueError(f"`parameters` cannot hold `{reserved[0]}`")
        return self
