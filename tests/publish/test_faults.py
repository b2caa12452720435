"""What goes wrong on the way: never public, never half a commit, and the same command goes on."""

from __future__ import annotations

import sys

import pytest

from tests.helpers.hub_repos import Fault
from tests.publish.conftest import (
    NAME,
    TOKEN,
    environment,
    files_of,
    on_hub,
    require_only,
    run,
)

API = f"/api/models/{NAME}"
FINAL = {
    "401": (Fault("GET /api/whoami-v2", 401), "does not know the token"),
    "403": (Fault("POST /api/repos/create", 403), "does not let this token"),
    "409": (Fault("POST /api/repos/create", 409), "conflicts"),
    "412": (Fault(f"POST {API}/commit/main", 412), "somebody else changed"),
    "429 for hours": (Fault(f"POST {API}/commit/main", 429, {"Retry-After": "7200"}), "too many"),
    "500 always": (Fault(f"POST {API}/commit/main", 500, times=99), "HTTP 500"),
    "lfs 403": (Fault("PUT /lfs/", 403, times=99), "does not let this token"),
    "lost always": (Fault("PUT /lfs/", 0, times=999), "connection failed"),
    "damaged": (Fault(f"POST {API}/commit/main", "damage"), "differ by hash"),
    "settings": (Fault(f"PUT {API}/settings", 403), "make it public"),
}


@pytest.mark.parametrize("name", FINAL)
def test_a_fault_is_a_named_error_and_never_public_and_the_next_run_ends_it(
    hub, out, publish, name
):
    fault, says = FINAL[name]
    hub.faults.append(fault)
    told = publish(public=True)
    assert says in told["error"]
    made = [repo for repo in hub.repos if repo.id == NAME]
    assert all(repo.private for repo in made)
    fault.times = 0
    assert publish(public=True)["public"] is True
    assert on_hub(hub) == files_of(out / "checkpoint")
    require_only(hub, files_of(out / "checkpoint"))


PASSING = {
    "429": (Fault(f"POST {API}/commit/main", 429, {"Retry-After": "7"}), 8.0),
    "429 at creation": (Fault("POST /api/repos/create", 429, {"Retry-After": "3"}), 4.0),
    "500 once": (Fault(f"POST {API}/commit/main", 500), 1.0),
    "503 twice": (Fault(f"GET {API}", 503, times=2), 2.0),
    "lost once": (Fault("PUT /lfs/", 0), None),
    "verify lost": (Fault("POST /lfs-verify", 0), None),
    "commit lost": (Fault(f"POST {API}/commit/main", 0), None),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_is_waited_out(hub, out, publish, name):
    fault, wait = PASSING[name]
    hub.faults.append(fault)
    told = publish()
    assert "error" not in told
    assert fault.times == 0
    assert wait is None or wait in told["slept"]
    assert on_hub(hub) == files_of(out / "checkpoint")
    assert len(hub.repo("model", NAME).commits) == 2  # the Hub's own, and ours


def test_what_an_interrupted_upload_left_is_not_sent_again(hub, out, publish):
    fault = Fault(f"POST {API}/commit/main", 403)
    hub.faults.append(fault)
    assert "error" in publish()
    assert on_hub(hub) == {}
    puts = sum(method == "PUT" for method, _ in hub.requests)
    publish()
    assert sum(method == "PUT" for method, _ in hub.requests) == puts
    assert on_hub(hub) == files_of(out / "checkpoint")


def test_of_several_large_files_only_those_that_are_missing_are_sent(hub, out, publish):
    fault = Fault("PUT /lfs/", 403, times=99, skip=1)
    hub.faults.append(fault)
    assert "error" in publish()
    there = set(hub.store)
    hub.faults.clear()
    hub.requests.clear()
    publish()
    puts = [
        path.rpartition("/")[2]
        for method, path in hub.requests
        if "PUT /lfs" in method + " " + path
    ]
    assert len(there) == 1
    assert len(puts) == len(set(puts)) == len(hub.store) - 1 > 0
    assert not there & set(puts)


def test_without_a_token(hub, publish):
    assert "hf auth login" in publish(alone={})["error"]
    assert hub.repos == []


def test_offline(hub, out, built, tmp_path):
    command = [sys.executable, "-m", "abliterator", "publish", str(out), "--repo-id", NAME]
    env = environment(hub, tmp_path / "home", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    done = run(command, env)
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "Traceback" not in done.stderr
