"""Prompts from Hub datasets, at a commit, through the `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.errors import PromptError
from abliterator.prompts._conversation import Prompt
from abliterator.prompts._file import (
    as_conversation,
    as_prompt,
    equals_strictly,
    holds_messages,
    shown,
)
from abliterator.prompts._groups import group_columns, read_clusters, read_groups
from abliterator.prompts._sets import PromptSet

if TYPE_CHECKING:
    from datasets import Dataset

    from abliterator.recipe import Source

COMMIT = re.compile(r"[0-9a-f]{40}")
# "text" comes late: instruction data often has a "text" with question and answer in one, and its
# "messages" mostly end with the answer, so those of a prompt set are taken where nothing else is.
USUAL_COLUMNS = ("prompt", "instruction", "Goal", "goal", "question", "text", "messages")


def resolve_revision(dataset: str, revision: str | None) -> str:
    """The commit (40 hex digits) of a Hub dataset's branch or tag; None is the default branch.

    A commit is returned as it is, without a request to the Hub.

    Raises:
        PromptError: no such dataset or revision, no access, or no connection.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    with _hub_errors(dataset, f"resolve its revision {revision or 'main'} to a commit"):
        return str(HfApi().dataset_info(dataset, revision=revision).sha)


def read_dataset(name: str, source: Source) -> PromptSet:
    """Every prompt of `source.dataset`, stripped, duplicates still in; empty rows are `dropped`."""
    assert source.dataset is not None
    commit = resolve_revision(source.dataset, source.revision)
    pinned = source.model_copy(update={"revision": commit, "split": source.split or "train"})
    with _hub_errors(source.dataset, f"load its split {pinned.split}"):
        rows = _load(pinned)
        license_ = _license(source.dataset, commit)
    _check_commit(rows, pinned)
    rows = _filtered(rows, source)
    column = _column(rows.column_names, source)
    prompts: list[Prompt] = []
    used: list[int] = []
    tools = rows["tools"] if "tools" in rows.column_names else [None] * len(rows)
    for number, (value, own_tools) in enumerate(zip(rows[column], tools, strict=True), start=1):
        where = f"Dataset {source.dataset}, split {pinned.split}, column {column}, row {number}"
        if holds_messages(value):
            prompts.append(as_conversation({column: value, "tools": own_tools}, column, where))
            used.append(number - 1)
            continue
        if value is not None and not isinstance(value, str):
            raise PromptError(
                f"{where}: not a text but of type {type(value).__name__}. Name a column of texts "
                f"with `column`; there are {shown(rows.column_names)}."
            )
        # a dataset's empty rows, which its user cannot correct, are counted; a file's are errors
        if value and value.strip():
            prompts.append(as_prompt(value, where))
            used.append(number - 1)
    return PromptSet(
        name=name,
        prompts=tuple(prompts),
        source=source.dataset,
        revision=commit,
        split=pinned.split,
        license=license_,
        dropped=len(rows) - len(prompts),
        groups=_groups(rows, used, source),
        clusters=_clusters(rows, used, source),
    )


def _load(source: Source) -> Dataset:
    from datasets import load_dataset

    return load_dataset(
        # Without the scheme, a local folder of the same name would be read instead.
        f"hf://datasets/{source.dataset}",
        name=source.config,
        split=source.split,
        revision=source.revision,
        keep_in_memory=False,  # so that `cache_files` says what was loaded
    )


def _filtered(rows: Dataset, source: Source) -> Dataset:
    """The rows whose columns have the values of `source.where`."""
    for column, expected in source.where.items():
        if column not in rows.column_names:
            raise PromptError(
                f"Dataset {source.dataset} has no column {column} to keep rows by: `where` takes "
                f"one of its own; there are {shown(rows.column_names)}."
            )
        values = enumerate(rows[column])
        rows = rows.select([i for i, value in values if equals_strictly(value, expected)])
    return rows


def _groups(rows: Dataset, used: list[int], source: Source) -> dict[str, tuple[str | None, ...]]:
    """The groups of the used rows, by column; classes have their names."""
    columns = [c for c in group_columns(source) if source.groups or c in rows.column_names]
    cells = {}
    for column in columns:
        if column not in rows.column_names:
            raise PromptError(
                f"Dataset {source.dataset} has no column {column} for `groups`: name one of its "
                f"own; there are {shown(rows.column_names)}."
            )
        values = list(rows[column])
        if hasattr(feature := rows.features[column], "int2str"):  # numbers that stand for names
            values = [None if number is None else feature.int2str(number) for number in values]
        cells[column] = [values[i] for i in used]
    return read_groups(cells, source, f"Dataset {source.dataset}")


def _clusters(rows: Dataset, used: list[int], source: Source) -> tuple[str | None, ...]:
    if source.cluster is None:
        return ()
    values = list(rows[source.cluster]) if source.cluster in rows.column_names else []
    cells = [values[i] for i in used] if values else []
    return read_clusters(cells, source, f"Dataset {source.dataset}")


def _check_commit(rows: Dataset, source: Source) -> None:
    """Refuses cached rows of another revision, which `datasets` loads without a connection."""
    if any(source.revision not in Path(file["filename"]).parts for file in rows.cache_files):
        raise PromptError(
            f"Dataset {source.dataset} could not be fetched from the Hub at revision "
            f"{source.revision}, and the newest copy in the cache is of another revision: connect "
            "once to fetch this one."
        )


def _license(dataset: str, commit: str) -> str | None:
    """The licence that the dataset's card states; None without a card or a licence in it."""
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        card = hf_hub_download(dataset, "README.md", repo_type="dataset", revision=commit)
    except EntryNotFoundError:
        return None
    stated = DatasetCard.load(card).data.to_dict().get("license")
    return ", ".join(stated) if isinstance(stated, list) else stated


def _column(columns: list[str], source: Source) -> str:
    candidates = (source.column,) if source.column else USUAL_COLUMNS
    present = [column for column in candidates if column in columns]
    if not present:
        raise PromptError(
            f"Dataset {source.dataset} has no column {' or '.join(candidates)}: name one of its "
            f"own with `column`; there are {shown(columns)}."
        )
    return present[0]


@contextmanager
def _hub_errors(dataset: str, action: str) -> Iterator[None]:
    """Turn what the Hub's libraries raise into a PromptError that names the dataset."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from yaml import YAMLError

    # HTTPError is the HTTP client's own (httpx, httpx2), which the Hub's errors derive from.
    expected = (DatasetsError, HTTPError, YAMLError, OSError, ValueError, RuntimeError)
    try:
        yield
    except expected as error:
        reason = " ".join(str(error).split()).rstrip(".")
        shown = reason if len(reason) <= 300 else f"{reason[:300]}..."
        raise PromptError(
            f"Dataset {dataset}: could not {action} ({type(error).__name__}: {shown}). Check its "
            "id, revision, config and split, the connection, and for a gated dataset HF_TOKEN; a "
            "local file is given with `path`."
        ) from None
