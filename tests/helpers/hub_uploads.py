"""What the Hub of the tests answers to those who write: uploads, commits, branches, settings."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from tests.helpers.hub_repos import Unseen, is_large

if TYPE_CHECKING:
    from tests.helpers.hub_server import Handler, HubServer


class Uploads:
    """One request that writes, or that only those who write make."""

    def __init__(
        self, handler: Handler, hub: HubServer, path: str, body: bytes, *, damage: bool
    ) -> None:
        self.handler, self.hub, self.path, self.body, self.damage = handler, hub, path, body, damage

    def answer(self) -> bool:
        """Answers the request, if it is one of these."""
        request = f"{self.handler.command} {self.path}"
        for pattern, action in _ROUTES:
            if found := re.fullmatch(pattern, request):
                parts = {name: unquote(part) for name, part in found.groupdict().items()}
                if action is not Uploads.put and not self.handler.has_token():
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
        modes = {path: "lfs" if is_large(path) else "regular" for path in files}
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
_ROUTES = (
    (r"GET /api/whoami-v2", Uploads.who),
    (r"POST /api/repos/create", Uploads.create),
    (r"POST /api/validate-yaml", Uploads.validate_yaml),
    (rf"PUT /api/models/{_REPO}/settings", Uploads.settings),
    (rf"POST /api/models/{_REPO}/preupload/{_REVISION}", Uploads.preupload),
    (rf"POST /{_REPO}.git/info/lfs/objects/batch", Uploads.batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", Uploads.put),
    (r"POST /lfs-verify", Uploads.verify),
    (rf"GET /api/models/{_REPO}/xet-(read|write)-token/{_REVISION}", Uploads.xet_token),
    (rf"POST /api/models/{_REPO}/commit/{_REVISION}", Uploads.commit),
    (rf"POST /api/models/{_REPO}/branch/(?P<name>[^/]+)", Uploads.branch),
    (rf"DELETE /api/models/{_REPO}/branch/(?P<name>[^/]+)", Uploads.delete_branch),
    (rf"GET /api/models/{_REPO}/commits/{_REVISION}", Uploads.commits),
    (rf"POST /api/models/{_REPO}/super-squash/{_REVISION}", Uploads.squash),
    (rf"POST /api/models/{_REPO}/tag/{_REVISION}", Uploads.tag),
    (rf"GET /api/models/{_REPO}/refs", Uploads.refs),
)
