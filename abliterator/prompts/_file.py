"""Prompt files: .txt (one prompt a line) and .jsonl (one object a line); errors name the line.

An object has a text under `prompt`, or a conversation under `messages`, with `tools` if it has any.
"""

from __future__ import annotations

import json
import re
import stat
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from abliterator.errors import FileError, PromptError
from abliterator.files import read_bytes
from abliterator.prompts._conversation import Conversation, Prompt, readable
from abliterator.prompts._groups import group_columns, read_clusters, read_groups
from abliterator.prompts._sets import PromptSet

if TYPE_CHECKING:
    from abliterator.recipe import Source

_MAX_BYTES = 256 << 20  # of a prompt file: a million prompts of a page each are less

NAME = re.compile(r"[\w.-]{1,40}")

LONGEST = 1 << 20  # characters of a prompt; a tokenizer takes seconds and gigabytes for a few more


def read_file(name: str, source: Source) -> PromptSet:
    """Every prompt of `source.path`, stripped, blank lines left out, duplicates still in."""
    path = source.path
    assert path is not None
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise PromptError(
            f"The {name} prompts file {path} ends in {suffix or 'no suffix'}; a prompt file is "
            '.txt (one prompt a line) or .jsonl (one {"prompt": ...} a line).'
        )
    columns = [*([source.column] if source.column else []), *source.where, *(source.groups or ())]
    columns += [source.cluster] if source.cluster else []
    if suffix == ".txt" and columns:
        raise PromptError(
            f"The {name} prompts name the column {columns[0]!r}, but {path} is plain text, "
            "which has no columns: remove `column`, `where` and `groups` (and `cluster`), or give "
            "a .jsonl file."
        )
    prompts: list[Prompt] = []
    clusters = []
    cells: dict[str, list[object]] = {}
    if suffix == ".jsonl":
        cells = {column: [] for column in group_columns(source)}
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            if suffix == ".txt":
                prompts.append(as_prompt(line, where))
                continue
            row = _row(line, where=where, key=source.column or "prompt")
            if all(equals_strictly(row.get(key), value) for key, value in source.where.items()):
                prompts.append(_prompt_of(row, source.column, where))
                for column, values in cells.items():
                    values.append(row.get(column))
                if source.cluster:
                    clusters.append(row.get(source.cluster))
    if not prompts and source.where:
        raise PromptError(f"No line of the {name} prompts file {path} is as `where` asks.")
    if not prompts:
        raise PromptError(f"The {name} prompts file {path} is empty: write one prompt a line.")
    origin = f"The {name} prompts file {path}"
    return PromptSet(
        name=name,
        prompts=tuple(prompts),
        source=path.name,
        groups=read_groups(cells, source, origin),
        clusters=read_clusters(clusters, source, origin) if source.cluster else (),
    )


def as_prompt(text: str, where: str) -> str:
    """The prompt without surrounding whitespace; PromptError for what no prompt is."""
    if len(text) > LONGEST:
        raise PromptError(
            f"{where}: {len(text):,} characters, and a prompt has {LONGEST:,} at most. Is the file "
            "one prompt a line? Shorten or remove this one."
        )
    if "\0" in text:
        raise PromptError(
            f"{where}: a NUL character. A prompt is text; is the file binary, or UTF-16? Save it "
            "as UTF-8."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(
            f"{where}: half of a surrogate pair (\\ud800 to \\udfff), which no tokenizer can "
            "read. Mend the broken escape."
        ) from None
    return text.strip()


def as_conversation(row: Mapping[str, object], column: str, where: str) -> Conversation:
    """The messages in a column of a row, with its `tools`; PromptError where none can be answered.

    Keys without a value, which tables of messages have, are left out.
    """
    messages, tools = row[column], row.get("tools") or ()
    plain = json.loads(json.dumps({"messages": messages, "tools": tools}, default=str))
    try:
        if not all(isinstance(entry, dict) for name in plain for entry in plain[name]):
            raise TypeError
        conversation = Conversation.model_validate(
            {name: [_without_none(entry) for entry in plain[name]] for name in plain}
        )
    except (ValidationError, TypeError) as error:
        own = error.errors()[0]["msg"] if isinstance(error, ValidationError) else ""
        problem = own.removeprefix("Value error, ") or "not a list of objects"
        raise PromptError(
            f'{where}: "{column}" is no conversation: {problem}. Expected a list of objects with '
            '"role" and "content", the last of them of the user, and in "tools", where the row '
            "has it, a list of JSON schemas."
        ) from None
    as_prompt(readable(conversation), where)
    return conversation


def holds_messages(value: object) -> bool:
    """Whether a value of a column is a list of messages, not of texts."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _without_none(message: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in message.items() if value is not None}


def shown(keys: Iterable[str]) -> str:
    """Keys or columns for a message; what is no plain name may be a prompt (CSV with no header)."""
    return ", ".join(key if NAME.fullmatch(key) else "(not a name)" for key in keys) or "none"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines: of plain text by any line end; of JSON Lines by line feeds alone.

    Other separators, such as U+2028, may stand in JSON texts and end no line in either.
    """
    content = _content(path)
    line_end = rb"\r\n|\r|\n" if path.suffix.lower() == ".txt" else rb"\n"
    for number, line in enumerate(re.split(line_end, content), start=1):
        try:
            yield number, line.decode()
        except UnicodeDecodeError:
            raise PromptError(
                f"{path}, line {number}: not UTF-8 text. Save the file with UTF-8 encoding."
            ) from None


def _content(path: Path) -> bytes:
    """The bytes of a regular file of a bounded size, without a byte order mark."""
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise PromptError(f"{path} is a folder; give one .txt or .jsonl file.")
        if not stat.S_ISREG(kind):
            raise PromptError(
                f"{path} is no regular file but a pipe, a device or a socket, and prompts are read "
                "more than once. Save them as a file."
            )
        return read_bytes(path, max_bytes=_MAX_BYTES).removeprefix(BOM_UTF8)
    except FileNotFoundError:
        raise PromptError(
            f"There is no prompt file {path} (looked from {Path.cwd()}): check the path."
        ) from None
    except (FileError, OSError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError):
            raise PromptError(str(error)) from None
        raise PromptError(
            f"The prompt file {path} cannot be read ({reason.strerror}): check its permissions."
        ) from None


def equals_strictly(value: object, expected: object) -> bool:
    """Whether two values are equal; True does not equal 1."""
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)


def _row(line: str, *, where: str, key: str) -> dict[str, object]:
    expected = f'expected one JSON object with a text under "{key}"'
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); {expected}."
        ) from None
    except (ValueError, RecursionError):  # a number too long, brackets too deep
        raise PromptError(f"{where}: JSON that cannot be read; {expected}.") from None
    if not isinstance(row, dict):
        raise PromptError(f"{where}: JSON, but no object; {expected}.")
    return row


def _prompt_of(row: Mapping[str, object], column: str | None, where: str) -> Prompt:
    """The prompt of a row: a text, or a list of messages."""
    if column is None and ("messages" not in row or "prompt" in row):
        return as_prompt(_field(row, "prompt", where=where), where)
    column = column or "messages"
    if holds_messages(row.get(column)) or (column in row and column == "messages"):
        return as_conversation(row, column, where)
    return as_prompt(_field(row, column, where=where), where)


def _field(row: Mapping[str, object], key: str, *, where: str) -> str:
    expected = f'expected one JSON object with a text under "{key}"'
    if key not in row:
        raise PromptError(
            f'{where}: no "{key}" among its keys ({shown(row)}); {expected}, or name another key '
            "with `column`."
        )
    value = row[key]
    if not isinstance(value, str):
        hint = ', or with a conversation under "messages"' if holds_messages(value) else ""
        kind = type(value).__name__
        raise PromptError(f'{where}: "{key}" is of type {kind}; {expected}{hint}.')
    if not value.strip():
        raise PromptError(f'{where}: "{key}" is an empty text. Remove the line, or write a prompt.')
    return value
