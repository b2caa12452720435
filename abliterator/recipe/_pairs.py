"""The specification of contrast pairs: a file of its own, not a part of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from abliterator.files import digest_of
from abliterator.recipe._section import Positive, Section, as_tuple
from abliterator.recipe._server import RESERVED, ServerSettings

Text = Annotated[str, Field(min_length=1)]


class PairExample(Section):
    """Two requests, alike but for the behaviour."""

    target: Text
    contrast: Text


class PairsSpec(Section):
    """Pairs of requests, as alike as possible, of which one shows a behaviour and one does not."""

    behaviour: Text
    """The behaviour, in a sentence, for the model that writes the pairs."""
    target: Text
    """Which requests show it."""
    contrast: Text
    """Which do not, though they have the same subject, form and length."""
    categories: dict[str, Text]
    """Name of each category, and what belongs to it."""
    per_category: Positive
    """Pairs of each category."""
    examples: Annotated[tuple[PairExample, ...], BeforeValidator(as_tuple)] = ()
    """Example pairs; they are not among those that are made."""
    language: Text = "English"
    """Language of the requests."""
    tokenizer: str | None = None
    """Model whose tokens measure a request: Hub id, local folder, `embedded:demo`.

    Default: words are counted, and the file says so.
    """
    length_gap: Annotated[int, Field(ge=0)] = 3
    """Tokens (or words) by which the two sides of a pair may differ."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of common letter trigrams from which two requests of one side count as duplicates."""
    per_call: Annotated[int, Field(ge=1, le=50)] = 10
    """Pairs requested in one call."""
    patience: Positive = 4
    """Consecutive calls without a new pair in a category after which the run ends with an error."""
    parameters: dict[str, Any] = {"temperature": 1}
    """Request parameters of the calls that write pairs, over `server.parameters`; the calls that
    check them use `server.parameters` alone."""
    server: ServerSettings = ServerSettings()
    """The model that writes the pairs and checks them."""

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        if not self.categories:
            raise ValueError("no category is given")
        if reserved := sorted(RESERVED & set(self.parameters)):
            raise ValueError(f"`parameters` cannot hold `{reserved[0]}`")
        return self

    @property
    def digest(self) -> str:
        """sha256 of everything in it, as canonical JSON."""
        return digest_of(self.model_dump(mode="json"))
