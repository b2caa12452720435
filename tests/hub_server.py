"""A small Hub on 127.0.0.1, to test the real `huggingface_hub` and `datasets` without a network.

It answers what downloading asks for, of models and of datasets: repository info, tree, paths-info,
and `resolve` with the headers that the clients need (ETag, X-Repo-Commit, X-Linked-Size, Range,
X-Error-Code). Large files go the way they go on the Hub: `resolve` redirects to another origin, to
a URL made of their sha256. It knows nothing of uploads. The clients read HF_ENDPOINT when they are
imported, so they must run in a subprocess with the environment that `hub.env` gives:

    with HubServer() as hub:
        commit = hub.commit("model", "somebody/tiny", {"config.json": b"{}"})
        subprocess.run([sys.executable, "-c", script], env=hub.env(tmp_path), check=True)
        assert ("GET", f"/somebody/tiny/resolve/{commit}/config.json") in hub.requests
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

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
    gated: bool = False

    def find(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


class HubServer:
    """Repositories held in memory and served while the context lasts.

    `requests` lists (method, path) of all that was asked, in order.
    """

    def __init__(self) -> None:
        self.repos: list[Repo] = []
        self.requests: list[tuple[str, str]] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def repo(self, kind: Kind, repo_id: str) -> Repo:
        """The repository of this name, made if there is none."""
        for repo in self.repos:
            if (repo.kind, repo.id) == (kind, repo_id):
                return repo
        self.repos.append(Repo(kind, repo_id))
        return self.repos[-1]

    def commit(self, kind: Kind, repo_id: str, files: Files | Path, *, ref: str = "main") -> str:
        """Commit exactly these files (or those of a folder), move `ref` there, return the sha."""
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        repo = self.repo(kind, repo_id)
        tree = sorted((path, _blob_id(content)) for path, content in files.items())
        sha = hashlib.sha1(json.dumps([kind, repo_id, len(repo.commits), tree]).encode())
        repo.commits[sha.hexdigest()] = files
        repo.refs[ref] = sha.hexdigest()
        return sha.hexdigest()

    def env(self, home: Path, **extra: str) -> dict[str, str]:
        """The environment for a subprocess that sees this Hub, caches in `home`, has no token."""
        ours = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **extra,
        }


class _Server(ThreadingHTTPServer):
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        hub = self.server.hub
        length = int(self.headers.get("Content-Length") or 0)
        form = parse_qs(self.rfile.read(length).decode())
        url = urlsplit(self.path)
        hub.requests.append((self.command, url.path))
        if url.path.startswith("/large/"):
            return self._large_file(url.path.removeprefix("/large/"))
        for repo in hub.repos:
            for prefix in (f"/api/{repo.kind}s/", "/" if repo.kind == "model" else "/datasets/"):
                start = prefix + repo.id
                if url.path == start or url.path.startswith(f"{start}/"):
                    action, *rest = url.path[len(start) + 1 :].split("/", maxsplit=2)
                    revision, path = (unquote(part) for part in [*rest, "", ""][:2])
                    commit = repo.find(revision or "main")
                    if commit is None:
                        return self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
                    if prefix.startswith("/api/"):
                        query = {**parse_qs(url.query), **form}
                        return self._api(repo, commit, action=action, path=path, query=query)
                    return self._resolve(repo, commit, action=action, path=path)
        return self._refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing on stderr: `HubServer.requests` is the log."""

    def _api(
        self, repo: Repo, commit: str, *, action: str, path: str, query: dict[str, list[str]]
    ) -> None:
        files = repo.commits[commit]
        if action in ("", "revision"):
            return self._json(_info(repo, commit))
        if repo.gated:
            return self._refuse(HTTPStatus.FORBIDDEN, "GatedRepo")
        if action == "paths-info":
            wanted = query.get("paths", [])
            return self._json([entry for entry in _entries(files) if entry["path"] in wanted])
        entries = [entry for entry in _entries(files) if PurePosixPath(path) in entry["parents"]]
        if action != "tree" or not entries:
            return self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")
        if query.get("recursive", [""])[0].lower() not in ("true", "1"):
            entries = [entry for entry in entries if entry["parents"][0] == PurePosixPath(path)]
        return self._json(entries)

    def _resolve(self, repo: Repo, commit: str, *, action: str, path: str) -> None:
        files = repo.commits[commit]
        if repo.gated:
            return self._refuse(HTTPStatus.FORBIDDEN, "GatedRepo")
        if action != "resolve" or path not in files:
            return self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", {"X-Repo-Commit": commit})
        content = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(content)}"'}
        if not _is_large(path):
            return self._bytes(content, headers)
        sha256 = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256}"'}
        # The clients treat another origin as the Hub's CDN: they read these headers and send it no
        # token. Their own origin they would follow at once, for headers that only the Hub has.
        headers["Location"] = f"http://localhost:{self.server.server_port}/large/{sha256}"
        return self._send(HTTPStatus.FOUND, b"", headers)

    def _large_file(self, sha256: str) -> None:
        for repo in self.server.hub.repos:
            for files in repo.commits.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == sha256:
                        return self._bytes(content, {"ETag": f'"{sha256}"'})
        return self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")

    def _bytes(self, content: bytes, headers: Mapping[str, str]) -> None:
        headers = {**headers, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._send(HTTPStatus.OK, content, headers)
        start, stop = int(wanted[1]), len(content)
        if wanted[2]:
            stop = min(int(wanted[2]) + 1, stop)
        if start >= stop:
            headers["Content-Range"] = f"bytes */{len(content)}"
            return self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", headers)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._send(HTTPStatus.PARTIAL_CONTENT, content[start:stop], headers)

    def _json(self, value: Any) -> None:
        body = json.dumps(value, default=str).encode()
        self._send(HTTPStatus.OK, body, {"Content-Type": "application/json"})

    def _refuse(
        self, status: HTTPStatus, code: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, **(headers or {})})

    def _send(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _blob_id(content: bytes) -> str:
    """Git's name of a file's content, which is the Hub's ETag of all but large files."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(path: str) -> bool:
    return PurePosixPath(path).suffix in LARGE_FILE_SUFFIXES


def _entries(files: Files) -> list[dict[str, Any]]:
    """Folders and files as `tree` and `paths-info` list them; `parents` is for our own use."""
    folders = {parent for path in files for parent in PurePosixPath(path).parents if parent.name}
    entries: list[dict[str, Any]] = [
        {"type": "directory", "path": str(folder), "oid": _blob_id(str(folder).encode())}
        for folder in sorted(folders)
    ]
    for path, content in sorted(files.items()):
        entry = {"type": "file", "path": path, "oid": _blob_id(content), "size": len(content)}
        if _is_large(path):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        entries.append(entry)
    return [{**entry, "parents": PurePosixPath(entry["path"]).parents} for entry in entries]


def _info(repo: Repo, commit: str) -> dict[str, Any]:
    return {
        "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "sha": commit,
        "private": False,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": path} for path in sorted(repo.commits[commit])],
    }
