"""The base class and shared types of a recipe's sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def as_tuple(value: object) -> object:
    # yaml has lists only, and strict validation would not take a list for a tuple
    return tuple(value) if isinstance(value, list) else value


Positive = Annotated[int, Field(ge=1)]
Layers = Annotated[tuple[Positive, ...], BeforeValidator(as_tuple)]


class Section(BaseModel):
    """Base of every section: unknown keys and wrong types are errors, nothing is coerced."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )
