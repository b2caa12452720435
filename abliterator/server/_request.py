"""One question to a server, and its name in a cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from abliterator.recipe import ServerSettings


class Request(NamedTuple):
    """A conversation, and the JSON object that shall be the reply to it."""

    messages: Sequence[Mapping[str, str]]
    schema: Mapping[str, Any]  # JSON schema of the object
    parameters: Mapping[str, Any]  # of sampling, as the server takes them

    def key(self, settings: ServerSettings) -> str:
        """Digest of everything that the reply depends on; no text is cut."""
        where = [settings.base_url, settings.model, settings.structured]
        return digest([where, self.messages, self.schema, self.parameters])


def digest(value: Any) -> str:
    """sha256 of a value as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
