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

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["model", "dataset"]
Files = Mapping[str, bytes]

LARGE_FILE_SUFFIXES = {".safetensors", ".parquet", ".bin", ".gguf"}
_PIECE = 1 << 16  # bytes sent at once


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
        tree = sorted((path, _sha256(content)) for path, content in files.items())
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


class _Handler(BaseHTTPRequestHandler):
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
        if _Uploads(self, hub, url.path, body, damage=damage).answer():
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
            return self.json(_info(repo, commit))
        if repo.gated:
            return self._refuse(HTTPStatus.FORBIDDEN, "GatedRepo")
        if action == "paths-info":
            wanted = query.get("paths", [])
            return self.json([entry for entry in _entries(files) if entry["path"] in wanted])
        entries = [entry for entry in _entries(files) if PurePosixPath(path) in entry["parents"]]
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
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(content)}"'}
        if not _is_large(path):
            return self._bytes(content, headers)
        sha256 = _sha256(content)
        headers |= {"X-Linked-Size": str(_size(content)), "X-Linked-ETag": f'"{sha256}"'}
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
                    if _sha256(content) == sha256:
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


class _Uploads:
    """One request that writes, or that only those who write make."""

    def __init__(
        self, handler: _Handler, hub: HubServer, path: str, body: bytes, *, damage: bool
    ) -> None:
        self.handler, self.hub, self.path, self.body, self.damage = handler, hub, path, body, damage

    def answer(self) -> bool:
        """Answers the request, if it is one of these."""
        request = f"{self.handler.command} {self.path}"
        for pattern, action in _UPLOAD_ROUTES:
            if found := re.fullmatch(pattern, request):
                parts = {name: unquote(part) for name, part in found.groupdict().items()}
                if action is not _Uploads.put and not self.handler.has_token():
                    self._error(HTTPStatus.UNAUTHORIZED)
                else:
                    action(self, **parts)
                return True
        return False

    def who(self) -> None:
        self.handler.json({"type": "user", "name": self.hub.user, "auth": {}})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or self.hub.user}/{asked['name']}"
        if any((repo.kind, repo.id) == ("model", repo_id) for repo in self.hub.repos):
            return self._error(HTTPStatus.CONFLICT)
        self.hub.commit("model", repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repo("model", repo_id).private = asked.get("visibility") == "private"
        return self.handler.json({"url": f"{self.hub.url}/{repo_id}"})

    def settings(self, repo_id: str) -> None:
        repo, asked = self.hub.repo("model", repo_id), json.loads(self.body)
        repo.settings.append(asked)
        repo.gating = asked.get("gated", repo.gating)
        if "visibility" in asked:
            repo.private = asked["visibility"] == "private"
        self.handler.json({})

    def validate_yaml(self) -> None:
        header = json.loads(self.body)["content"].split("---\n")[1]
        errors = [] if "library_name:" in header else [{"message": "no library_name"}]
        body = json.dumps({"warnings": [], "errors": errors}).encode()
        self.handler._send(HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK, body, {})

    def preupload(self, repo_id: str, revision: str) -> None:
        files = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if _is_large(path) else "regular" for path in files}
        self.handler.json(
            {
                "files": [
                    {"path": path, "uploadMode": mode, "shouldIgnore": False}
                    for path, mode in modes.items()
                ]
            }
        )

    def batch(self, repo_id: str) -> None:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.store:
                # as on the Hub, another origin takes the bytes, and it gets no token
                href = f"http://localhost:{self.handler.server.server_port}/lfs/{item['oid']}"
                item["actions"] = {
                    "upload": {"href": href},
                    "verify": {"href": f"{self.hub.url}/lfs-verify"},
                }
        self.handler.json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if "Authorization" in self.handler.headers:
            self.hub.leaked_tokens.append(self.path)
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(HTTPStatus.BAD_REQUEST)
        self.hub.store[oid] = self.body
        return self.handler._send(HTTPStatus.OK, b"", {})

    def verify(self) -> None:
        asked = json.loads(self.body)
        whole = len(self.hub.store.get(asked["oid"], b"")) == asked["size"]
        self.handler._send(HTTPStatus.OK if whole else HTTPStatus.NOT_FOUND, b"{}", {})

    def xet_token(self, repo_id: str, revision: str) -> None:
        if self.hub.xet_store is None:
            return self._error(HTTPStatus.NOT_FOUND)
        info = {
            "casUrl": f"local://{self.hub.xet_store}",
            "exp": int(time.time()) + 3600,
            "accessToken": "xet",
        }
        headers = {
            "X-Xet-Cas-Url": info["casUrl"],
            "X-Xet-Token-Expiration": str(info["exp"]),
            "X-Xet-Access-Token": info["accessToken"],
            "Content-Type": "application/json",
        }
        return self.handler._send(HTTPStatus.OK, json.dumps(info).encode(), headers)

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self.hub.repo("model", repo_id)
        lines = [json.loads(line) for line in self.body.splitlines()]
        head = repo.find(revision)
        parent = lines[0]["value"].get("parentCommit")
        if head is None or (parent is not None and parent != head):
            return self._error(HTTPStatus.PRECONDITION_FAILED)
        files = dict(repo.commits[head])
        for line in lines[1:]:
            if line["key"] == "deletedFile":
                del files[line["value"]["path"]]
                continue
            content = self._content(line)
            if content is None:
                return self._error(HTTPStatus.BAD_REQUEST)
            files[line["value"]["path"]] = content
        pull = "create_pr=1" in self.handler.path
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        ref = f"refs/pr/{number}" if pull else revision
        if pull:
            repo.refs[ref] = head
        sha = self.hub.commit("model", repo_id, files, ref=ref)
        url = f"{self.hub.url}/{repo_id}"
        return self.handler.json(
            {
                "commitOid": sha,
                "commitUrl": f"{url}/commit/{sha}",
                "pullRequestUrl": f"{url}/discussions/{number}" if pull else None,
            }
        )

    def _content(self, line: dict[str, Any]) -> bytes | None:
        value = line["value"]
        if line["key"] == "file":
            return base64.b64decode(value["content"])
        if self.hub.xet_store is not None:
            content = Unseen(b"\0")
            content.sha256, content.size = value["oid"], value["size"]
            return content
        stored = self.hub.store.get(value["oid"])
        return stored[::-1] if self.damage and stored is not None else stored

    def branch(self, repo_id: str, name: str) -> None:
        repo = self.hub.repo("model", repo_id)
        if name in repo.refs:
            return self._error(HTTPStatus.CONFLICT)
        start = repo.find(json.loads(self.body).get("startingPoint", "main"))
        assert start is not None
        repo.refs[name] = start
        return self.handler.json({})

    def delete_branch(self, repo_id: str, name: str) -> None:
        repo = self.hub.repo("model", repo_id)
        if name == "main" or name not in repo.refs:
            return self._error(HTTPStatus.NOT_FOUND)
        del repo.refs[name]
        return self.handler.json({})

    def commits(self, repo_id: str, revision: str) -> None:
        history = self.hub.repo("model", repo_id).history(revision)
        dated = {"authors": [], "date": "2025-01-01T00:00:00.000Z", "title": "", "message": ""}
        self.handler.json([{"id": sha, **dated} for sha in history])

    def squash(self, repo_id: str, revision: str) -> None:
        repo = self.hub.repo("model", repo_id)
        files = repo.commits[repo.refs.pop(revision)]
        self.hub.commit("model", repo_id, files, ref=revision)
        self.handler.json({})

    def tag(self, repo_id: str, revision: str) -> None:
        repo, name = self.hub.repo("model", repo_id), json.loads(self.body)["tag"]
        if name in repo.refs:
            return self._error(HTTPStatus.CONFLICT)
        commit = repo.find(revision)
        assert commit is not None
        repo.refs[name] = commit
        repo.tags.add(name)
        return self.handler.json({})

    def refs(self, repo_id: str) -> None:
        repo = self.hub.repo("model", repo_id)
        told: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
        for name, commit in repo.refs.items():
            kind = "tags" if name in repo.tags else "branches"
            told[kind].append({"name": name, "ref": name, "targetCommit": commit})
        self.handler.json(told)

    def _error(self, status: HTTPStatus) -> None:
        self.handler._send(status, b'{"error": "refused"}', {})


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_UPLOAD_ROUTES = (
    (r"GET /api/whoami-v2", _Uploads.who),
    (r"POST /api/repos/create", _Uploads.create),
    (r"POST /api/validate-yaml", _Uploads.validate_yaml),
    (rf"PUT /api/models/{_REPO}/settings", _Uploads.settings),
    (rf"POST /api/models/{_REPO}/preupload/{_REVISION}", _Uploads.preupload),
    (rf"POST /{_REPO}.git/info/lfs/objects/batch", _Uploads.batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", _Uploads.put),
    (r"POST /lfs-verify", _Uploads.verify),
    (rf"GET /api/models/{_REPO}/xet-(read|write)-token/{_REVISION}", _Uploads.xet_token),
    (rf"POST /api/models/{_REPO}/commit/{_REVISION}", _Uploads.commit),
    (rf"POST /api/models/{_REPO}/branch/(?P<name>[^/]+)", _Uploads.branch),
    (rf"DELETE /api/models/{_REPO}/branch/(?P<name>[^/]+)", _Uploads.delete_branch),
    (rf"GET /api/models/{_REPO}/commits/{_REVISION}", _Uploads.commits),
    (rf"POST /api/models/{_REPO}/super-squash/{_REVISION}", _Uploads.squash),
    (rf"POST /api/models/{_REPO}/tag/{_REVISION}", _Uploads.tag),
    (rf"GET /api/models/{_REPO}/refs", _Uploads.refs),
)


def _sha256(content: bytes) -> str:
    return content.sha256 if isinstance(content, Unseen) else hashlib.sha256(content).hexdigest()


def _size(content: bytes) -> int:
    return content.size if isinstance(content, Unseen) else len(content)


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
        entry = {"type": "file", "path": path, "oid": _blob_id(content), "size": _size(content)}
        if _is_large(path):
            large = {"oid": _sha256(content), "size": _size(content), "pointerSize": 130}
            entry["lfs"] = large
        entries.append(entry)
    return [{**entry, "parents": PurePosixPath(entry["path"]).parents} for entry in entries]


def _info(repo: Repo, commit: str) -> dict[str, Any]:
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
