"""A small Hub on 127.0.0.1, to test the real `huggingface_hub` and `datasets` without a network.

It answers what downloading asks for, of models and of datasets: repository info, tree, paths-info,
and `resolve` with the headers that the clients need (ETag, X-Repo-Commit, X-Linked-Size, Range,
X-Error-Code). Large files go the way they go on the Hub: `resolve` redirects to another origin, to
a URL made of their sha256. And it takes uploads of models, by LFS or by a local xet store: create,
settings, validate-yaml, preupload, batch, PUT with its sha256 checked, commit, commits, branch,
tag, super-squash. What goes wrong is set in `faults`. The clients read HF_ENDPOINT when they are
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
from collections import Counter
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.hub_repos import (
    Fault,
    Files,
    Kind,
    Repo,
    blob_id,
    entries_of,
    info_of,
    is_large,
    sha256_of,
    size_of,
)
from tests.helpers.hub_uploads import Uploads

_PIECE = 1 << 16  # bytes sent at once


class HubServer:
    """Repositories held in memory and served while the context lasts.

    `requests` lists (method, path) of all that was asked, in order. `store` holds large files by
    sha256. With `token`, writing and private repositories need it. With `xet_store`, large files go
    there and not through LFS, and come from there: `xet_hashes` gives the hash by which the store
    knows a file of that sha256, which the Hub reads out of what was uploaded. `sent` counts the
    bytes of bodies by path; without `ranges`, files are sent whole whatever part is asked for.
    `on_request` is called before each request is read, in the thread that answers it.
    """

    def __init__(self) -> None:
        self.repos: list[Repo] = []
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.store: dict[str, bytes] = {}
        self.token: str | None = None
        self.user = "somebody"
        self.xet_store: Path | None = None
        self.xet_hashes: dict[str, str] = {}
        self.leaked_tokens: list[str] = []  # paths of other origins that were sent a token
        self.ranges = True
        self.on_request: Callable[[], None] = lambda: None
        self.sent: Counter[str] = Counter()
        self._server = _Server(("127.0.0.1", 0), Handler)
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
        tree = sorted((path, sha256_of(content)) for path, content in files.items())
        sha = hashlib.sha1(json.dumps([kind, repo_id, len(repo.commits), tree]).encode())
        repo.commits[sha.hexdigest()] = files
        if ref in repo.refs:
            repo.parents[sha.hexdigest()] = repo.refs[ref]
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
            **extra,
        }


class _Server(ThreadingHTTPServer):
    hub: HubServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    mute = False

    def do_GET(self) -> None:
        hub = self.server.hub
        url = urlsplit(self.path)
        hub.requests.append((self.command, url.path))
        hub.on_request()
        fault = self._fault(url.path)
        if fault is not None and fault.status == 0:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            return None
        body = self._body()
        if fault is not None and isinstance(fault.status, int):
            return self._send(HTTPStatus(fault.status), b"{}", fault.headers)
        self.mute = fault is not None and fault.status == "mute"
        damage = fault is not None and fault.status == "damage"
        if Uploads(self, hub, url.path, body, damage=damage).answer():
            return None
        form = parse_qs(body.decode()) if self.command == "POST" else {}
        if url.path.startswith("/large/"):
            return self._large_file(url.path.removeprefix("/large/"))
        for repo in hub.repos:
            for prefix in (f"/api/{repo.kind}s/", "/" if repo.kind == "model" else "/datasets/"):
                start = prefix + repo.id
                if url.path == start or url.path.startswith(f"{start}/"):
                    if repo.private and not self.has_token():
                        return self._refuse(HTTPStatus.UNAUTHORIZED, "RepoNotFound")
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

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def has_token(self) -> bool:
        """Whether the request carries the token that writing needs."""
        token = self.server.hub.token
        return token is None or self.headers.get("Authorization") == f"Bearer {token}"

    def _fault(self, path: str) -> Fault | None:
        for fault in self.server.hub.faults:
            if fault.times and f"{self.command} {path}".startswith(fault.request):
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_: object) -> None:
        """Nothing on stderr: `HubServer.requests` is the log."""

    def _api(
        self, repo: Repo, commit: str, *, action: str, path: str, query: dict[str, list[str]]
    ) -> None:
        files = repo.commits[commit]
        if action in ("", "revision"):
            return self.json(info_of(repo, commit))
        if repo.gated:
            return self._refuse(HTTPStatus.FORBIDDEN, "GatedRepo")
        if action == "paths-info":
            wanted = query.get("paths", [])
            return self.json([entry for entry in entries_of(files) if entry["path"] in wanted])
        entries = [entry for entry in entries_of(files) if PurePosixPath(path) in entry["parents"]]
        if action != "tree" or not entries:
            return self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")
        if query.get("recursive", [""])[0].lower() not in ("true", "1"):
            entries = [entry for entry in entries if entry["parents"][0] == PurePosixPath(path)]
        return self.json(entries)

    def _resolve(self, repo: Repo, commit: str, *, action: str, path: str) -> None:
        files = repo.commits[commit]
        if repo.gated:
            return self._refuse(HTTPStatus.FORBIDDEN, "GatedRepo")
        if action != "resolve" or path not in files:
            return self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", {"X-Repo-Commit": commit})
        content = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_id(content)}"'}
        if not is_large(path):
            return self._bytes(content, headers)
        sha256 = sha256_of(content)
        headers |= {"X-Linked-Size": str(size_of(content)), "X-Linked-ETag": f'"{sha256}"'}
        # The clients treat another origin as the Hub's CDN: they read these headers and send it no
        # token. Their own origin they would follow at once, for headers that only the Hub has.
        known = self.server.hub.xet_hashes.get(sha256)
        if known is not None:
            route = f"{self.server.hub.url}/api/models/{repo.id}/xet-read-token/{commit}"
            headers["X-Xet-Hash"] = known
            headers["Link"] = f'<{route}>; rel="xet-auth"'
        headers["Location"] = f"http://localhost:{self.server.server_port}/large/{sha256}"
        return self._send(HTTPStatus.FOUND, b"", headers)

    def _large_file(self, sha256: str) -> None:
        for repo in self.server.hub.repos:
            for files in repo.commits.values():
                for content in files.values():
                    if sha256_of(content) == sha256:
                        return self._bytes(content, {"ETag": f'"{sha256}"'})
        return self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")

    def _bytes(self, content: bytes, headers: Mapping[str, str]) -> None:
        headers = {**headers, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or not self.server.hub.ranges:
            return self._send(HTTPStatus.OK, content, headers)
        start, stop = int(wanted[1]), len(content)
        if wanted[2]:
            stop = min(int(wanted[2]) + 1, stop)
        if start >= stop:
            headers["Content-Range"] = f"bytes */{len(content)}"
            return self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", headers)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._send(HTTPStatus.PARTIAL_CONTENT, content[start:stop], headers)

    def json(self, value: Any) -> None:
        body = json.dumps(value, default=str).encode()
        self._send(HTTPStatus.OK, body, {"Content-Type": "application/json"})

    def _refuse(
        self, status: HTTPStatus, code: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, **(headers or {})})

    def _send(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str]) -> None:
        if self.mute:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            for start in range(0, len(body), _PIECE):
                piece = body[start : start + _PIECE]
                self.wfile.write(piece)
                self.server.hub.sent[urlsplit(self.path).path] += len(piece)
        except ConnectionError:  # the client has enough
            self.close_connection = True
