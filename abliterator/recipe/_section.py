"""The base class and shared types of a recipe's sections."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)


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
    later_keys: ClassVar[tuple[str, ...]] = ()
    """Keys that are left out of the dump at their default: recipes of before keep their digests."""

    @model_serializer(mode="wrap")
    def _dump_changed(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without later keys at their defaults; `plain` leaves out what its caller excluded."""
        values: dict[str, Any] = plain(self)
        for key in self.later_keys:
            if getattr(self, key) == type(self).model_fields[key].default:
                values.pop(key, None)
        return values
