"""One request to a server, and its key in a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from abliterator.files import digest_of
from abliterator.recipe import ServerSettings


class Request(NamedTuple):
    """A conversation, and the JSON object that is expected as the reply to it."""

    messages: Sequence[Mapping[str, str]]
    schema: Mapping[str, Any]  # JSON schema of the object
    parameters: Mapping[str, Any]  # of sampling, as the server takes them

    def key(self, settings: ServerSettings) -> str:
        """Digest of everything that the reply depends on; no text is cut."""
        server = [settings.base_url, settings.model, settings.structured]
        return digest_of([server, self.messages, self.schema, self.parameters])
