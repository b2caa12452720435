"""Requests, replies, and a write-through cache of them, so that no paid call is made twice.

One SQLite file. A reply is on disk before it is used; what a killed process had in flight is all
it can lose. Keys hold everything that a reply depends on, and no text is cut.

    with ReplyCache(Path("work/judge.sqlite")) as cache:
        cache.put("key", Reply(text="{}", finish_reason="stop"), cost=0.0)
        cache.get("key").text
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from abliterator.errors import ServerError
from abliterator.files import digest_of
from abliterator.recipe import ServerSettings

_TABLE = """CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, account TEXT NOT NULL, reply TEXT NOT NULL, cost REAL NOT NULL
) WITHOUT ROWID"""


class Request(NamedTuple):
    """A conversation, and the JSON object that is expected as the reply to it."""

    messages: Sequence[Mapping[str, str]]
    schema: Mapping[str, Any]  # JSON schema of the object
    parameters: Mapping[str, Any]  # of sampling, as the server takes them

    def key(self, settings: ServerSettings) -> str:
        """Digest of everything that the reply depends on; no text is cut."""
        server = [settings.base_url, settings.model, settings.structured]
        return digest_of([server, self.messages, self.schema, self.parameters])


class CompletionRequest(NamedTuple):
    """A prompt to be continued, as the body of /v1/completions without the model's name.

    `identity` says what answers: a digest of files, a version, or what else a reply depends on
    beside the body. Not the address, since the same model may be served at another the next time.
    """

    body: Mapping[str, Any]
    identity: str

    def key(self, settings: ServerSettings) -> str:
        """Digest of everything that the reply depends on; no text is cut."""
        return digest_of(["completions", self.identity, settings.model, self.body])


class Reply(NamedTuple):
    """A reply, and the server's metadata of it; token counts are 0 where it reports none.

    `token_ids` are those of the text, of a completion whose server gives them.
    """

    text: str
    finish_reason: str | None = None
    model: str | None = None
    fingerprint: str | None = None
    response_format: str | None = None  # how structured output was requested
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    token_ids: Sequence[int] | None = None


class ReplyCache:
    """Replies by key; totals are kept by `account`, since several judges may share a file."""

    def __init__(self, path: Path, *, account: str = "") -> None:
        self._account, self._path = account, path
        with self._usable():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise ValueError("it is no regular file")
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30)
            # a commit survives the death of the process; a sync per reply would guard no more
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(_TABLE)

    def get(self, key: str) -> Reply | None:
        """The reply stored under a key; None where there is none, or its row was changed."""
        query = "SELECT account, reply, cost FROM replies WHERE key = ?"
        with self._usable():
            row = self._db.execute(query, (key,)).fetchone()
            if row is None:
                return None
            account, text, cost = row
            fields = json.loads(text)
            sha256 = fields.pop("sha256", None)  # files of older versions have none
            reply = Reply(response_format=fields.pop("rung", None), **fields)
            return reply if sha256 in (None, _digest(key, account, reply, cost)) else None

    def put(self, key: str, reply: Reply, *, cost: float) -> None:
        """Stores a reply; it is on disk when this returns."""
        digest = _digest(key, self._account, reply, cost)
        text = json.dumps({**_stored(reply), "sha256": digest})
        row = (key, self._account, text, cost)
        with self._usable():
            self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)

    def totals(self) -> tuple[int, float]:
        """(calls, dollars) of all replies that this account has in the file."""
        query = "SELECT count(*), coalesce(sum(cost), 0) FROM replies WHERE account = ?"
        with self._usable():
            calls, cost = self._db.execute(query, (self._account,)).fetchone()
            return int(calls), float(cost)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Raises ServerError for a damaged or locked file, and for a full disk."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError, AttributeError) as error:
            raise ServerError(
                f"The cache of replies {self._path} cannot be used ({error}). Free the disk or "
                "unlock the file; if it is damaged, delete it: its replies are then asked for "
                "again."
            ) from None

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stored(reply: Reply) -> dict[str, Any]:
    """The reply as a row has it; the response format has its name in files of older versions."""
    plain = reply._asdict()
    if reply.token_ids is None:  # no such field in files of older versions
        del plain["token_ids"]
    return {"rung": plain.pop("response_format"), **plain}


def _digest(key: str, account: str, reply: Reply, cost: float) -> str:
    """SHA-256 of all that a row holds."""
    return digest_of([key, account, _stored(reply), float(cost)])
