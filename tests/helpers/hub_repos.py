"""What the Hub of the tests holds: repositories, their files, and faults that are set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

Kind = Literal["model", "dataset"]
Files = Mapping[str, bytes]
LARGE_FILE_SUFFIXES = {".safetensors", ".parquet", ".bin", ".gguf"}


@dataclass
class Repo:
    """One repository: every commit has all its files; `refs` are branches and tags."""

    kind: Kind
    id: str
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False  # this client has no access
    private: bool = False
    gating: str | bool = False
    tags: set[str] = field(default_factory=set)  # the refs that are tags
    settings: list[dict[str, Any]] = field(default_factory=list)  # every change of them, in order
    parents: dict[str, str] = field(default_factory=dict)  # the commit before each, if any

    def history(self, revision: str) -> list[str]:
        """The commits of a branch, newest first."""
        found: list[str] = []
        commit = self.find(revision)
        while commit is not None:
            found.append(commit)
            commit = self.parents.get(commit)
        return found

    def find(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Fault:
    """What happens to the next `times` requests of which "METHOD /path" begins with `request`.

    The first `skip` of them go through. `status` 0 cuts the connection after half of the body;
    "damage" stores a file, but not as sent; "mute" does what was asked, and cuts the connection
    before it says so.
    """

    request: str
    status: int | Literal["damage", "mute"]
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    skip: int = 0


class Unseen(bytes):
    """A large file whose bytes went to the xet store: only its hash and size are known."""

    sha256: str
    size: int


def sha256_of(content: bytes) -> str:
    return content.sha256 if isinstance(content, Unseen) else hashlib.sha256(content).hexdigest()


def size_of(content: bytes) -> int:
    return content.size if isinstance(content, Unseen) else len(content)


def blob_id(content: bytes) -> str:
    """Git's name of a file's content, which is the Hub's ETag of all but large files."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    return PurePosixPath(path).suffix in LARGE_FILE_SUFFIXES


def entries_of(files: Files) -> list[dict[str, Any]]:
    """Folders and files as `tree` and `paths-info` list them; `parents` is for our own use."""
    folders = {parent for path in files for parent in PurePosixPath(path).parents if parent.name}
    entries: list[dict[str, Any]] = [
        {"type": "directory", "path": str(folder), "oid": blob_id(str(folder).encode())}
        for folder in sorted(folders)
    ]
    for path, content in sorted(files.items()):
        entry = {"type": "file", "path": path, "oid": blob_id(content), "size": size_of(content)}
        if is_large(path):
            large = {"oid": sha256_of(content), "size": size_of(content), "pointerSize": 130}
            entry["lfs"] = large
        entries.append(entry)
    return [{**entry, "parents": PurePosixPath(entry["path"]).parents} for entry in entries]


def info_of(repo: Repo, commit: str) -> dict[str, Any]:
    return {
        "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "sha": commit,
        "private": repo.private,
        "gated": "manual" if repo.gated else repo.gating,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": path} for path in sorted(repo.commits[commit])],
    }
