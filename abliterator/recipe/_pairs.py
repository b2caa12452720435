"""What contrast pairs are to be made; a file of its own, not a part of a recipe."""

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
    """The behaviour, in a sentence; the model is told it."""
    target: Text
    """Which requests show it."""
    contrast: Text
    """Which do not, though they have the same subject, form and length."""
    categories: dict[str, Text]
    """Name of each category, and what belongs to it."""
    per_category: Positive
    """Pairs of each category."""
    examples: Annotated[tuple[PairExample, ...], BeforeValidator(as_tuple)] = ()
    """Pairs that show what is meant; they are not among those that are made."""
    language: Text = "English"
    """Language of the requests."""
    tokenizer: str | None = None
    """Model whose tokens measure a request: Hub id, local folder, `embedded:demo`.

    Default: words are counted, and the file says so.
    """
    length_gap: Annotated[int, Field(ge=0)] = 3
    """Tokens (or words) by which the two sides of a pair may differ."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of letter trigrams in common from which on two requests of one side are one."""
    per_call: Annotated[int, Field(ge=1, le=50)] = 10
    """Pairs asked for in one call."""
    patience: Positive = 4
    """Calls in a row that may bring a category nothing; then the run ends, and says why."""
    parameters: dict[str, Any] = {"temperature": 1}
    """Of the calls that write pairs, over `server.parameters`, which are for checking them."""
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
