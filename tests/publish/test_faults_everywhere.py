"""Every fault at every request of the way, one at a time.

Whatever happens: the repository is not public before the end, its main branch has nothing or all of
one commit, and the same command ends what an earlier one began, sending no large file twice.
"""

from __future__ import annotations

import pytest

from tests.helpers.hub_repos import Fault
from tests.publish.conftest import NAME, commits, files_of, on_hub

API = f"/api/models/{NAME}"
REQUESTS = {
    "who": "GET /api/whoami-v2",
    "look": f"GET {API}",
    "create": "POST /api/repos/create",
    "branches": f"GET {API}/refs",
    "gate": f"PUT {API}/settings",
    "tree": f"GET {API}/tree/",
    "header": "POST /api/validate-yaml",
    "mark": f"POST {API}/branch/",
    "preupload": f"POST {API}/preupload/",
    "batch": f"POST /{NAME}.git/info/lfs/objects/batch",
    "put": "PUT /lfs/",
    "verify": "POST /lfs-verify",
    "commit": f"POST {API}/commit/",
    "read back": f"GET {API}/tree/",
    "commits": f"GET {API}/commits/",
    "unmark": f"DELETE {API}/branch/",
    "tag": f"POST {API}/tag/",
    "visibility": f"PUT {API}/settings",
}
# how many such requests go through before the fault
AFTER = {"read back": 2, "visibility": 1}
FAULTS = {
    "401": (401, {}),
    "403": (403, {}),
    "409": (409, {}),
    "429": (429, {"Retry-After": "3"}),
    "500": (500, {}),
    "lost": (0, {}),
    "answer lost": ("mute", {}),
}
PASSES = {"429", "500", "lost", "answer lost"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_no_fault_does_harm(hub, out, publish, request_, fault):
    status, headers = FAULTS[fault]
    injected = Fault(REQUESTS[request_], status, headers, skip=AFTER.get(request_, 0))
    hub.faults.append(injected)
    asked = {"public": True, "gated": "auto", "tag": "v1"}
    told = publish(**asked)
    assert injected.times == 0, "the fault did not happen"
    wanted = files_of(out / "checkpoint")
    repos = [repo for repo in hub.repos if repo.id == NAME]
    assert ("error" not in told) == (fault in PASSES), told
    if fault not in PASSES:
        assert all(repo.private for repo in repos)
        assert "\n" not in told["error"]
        said = (f"HTTP {fault}", "already", "has made no branch")
        assert any(words in told["error"] for words in said)
        assert all(on_hub(hub) in ({}, wanted) for _ in repos)
        told = publish(**asked)
    assert told["public"] is True
    assert on_hub(hub) == wanted
    assert commits(hub) - (request_ == "commit" and fault != "answer lost") == 1
    (repo,) = (repo for repo in hub.repos if repo.id == NAME)
    assert len(repo.commits) == 2  # the Hub's own, and ours
    assert set(repo.refs) == {"main", "v1"}
    assert (repo.private, repo.gating) == (False, "auto")
    assert repo.settings[-1] == {"visibility": "public"}
    sent = [path for method, path in hub.requests if method == "PUT" and "/lfs/" in path]
    assert len(sent) - (request_ == "put") == len(set(sent))
    assert hub.leaked_tokens == []
