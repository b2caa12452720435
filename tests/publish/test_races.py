"""Files that change under a publication: every byte on the Hub was verified, or a named error."""

from __future__ import annotations

from pathlib import Path

import pytest

from abliterator.checkpoint import ADAPTER_WEIGHTS
from abliterator.errors import FileError, PublishError
from abliterator.publish import Target, _plan, plan_adapter, plan_publish
from tests.helpers.hub_repos import Fault
from tests.publish.conftest import NAME, commits, files_of, on_hub, require_only

API = f"/api/models/{NAME}"
LORA = "somebody/tiny-lora"
REQUESTS = 32  # at least as many as a publication makes


def swap(folder: Path, files: dict[str, bytes], *, wrong: bool) -> None:
    """Puts other files of the same sizes in the place of these, or these again."""
    for name, content in files.items():
        other = folder / f"{name}.other"
        other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if wrong else content)
        other.replace(folder / name)


def smallest_shard(out: Path) -> int:
    return min(path.stat().st_size for path in (out / "checkpoint").glob("*.safetensors"))


@pytest.fixture
def held(out) -> int:
    """A size above which only weights are: they go from the disk, as in a model of real size."""
    sizes = {name: len(content) for name, content in files_of(out / "checkpoint").items()}
    limit = smallest_shard(out) - 1
    return limit if all(size <= limit or "model-" in name for name, size in sizes.items()) else 0


@pytest.mark.parametrize("at", range(REQUESTS))
def test_all_files_change_at_a_request(hub, out, publish, held, at):
    """Every third time they are as they were from the next request on."""
    back = at % 3 == 0
    assert held > 0
    wanted = files_of(out / "checkpoint")
    seen = 0

    def on_request() -> None:
        nonlocal seen
        if seen in (at, at + 1):
            swap(out / "checkpoint", wanted, wrong=seen == at or not back)
        seen += 1

    hub.on_request = on_request
    answer = publish(public=True, held=held)
    hub.on_request = lambda: None
    require_only(hub, wanted)
    if "error" in answer:
        assert "changed after it was verified" in answer["error"]
        assert hub.repo("model", NAME).private
        swap(out / "checkpoint", wanted, wrong=False)
        answer = publish(public=True, held=held)
    assert answer["public"] is True
    assert on_hub(hub) == wanted
    require_only(hub, wanted)
    assert set(hub.repo("model", NAME).refs) == {"main"}


def test_requests_are_all_tried(hub, publish):
    publish(public=True)
    assert len(hub.requests) <= REQUESTS


@pytest.mark.parametrize("at", range(0, REQUESTS, 3))
def test_the_files_of_an_adapter_change_at_a_request(hub, out, publish, at):
    wanted = {**files_of(out / "checkpoint"), **files_of(out / "adapter")}
    seen = 0

    def on_request() -> None:
        nonlocal seen
        if seen == at:
            for name in ("checkpoint", "adapter"):
                swap(out / name, files_of(out / name), wrong=True)
        seen += 1

    hub.on_request = on_request
    answer = publish(adapter=True, repo_id=LORA, public=True)
    assert answer["public"] is True  # all of it was held in memory
    require_only(hub, wanted, name=LORA)


def test_large_files_that_are_gone(hub, out, publish, held):
    def on_request() -> None:
        for path in (out / "checkpoint").glob("*.safetensors"):
            path.unlink()

    hub.on_request = on_request
    assert "changed after it was verified" in publish(public=True, held=held)["error"]
    assert commits(hub) == 0


@pytest.mark.parametrize("name", ["config.json", "README.md", "model-", "abliterator/record.json"])
def test_a_file_that_changes_while_it_is_verified(built, out, monkeypatch, name):
    """Also where it is the same again afterwards: what was verified may have been the other."""
    checkpoint = out / "checkpoint"
    (path,) = sorted(p for p in files_of(checkpoint) if p.startswith(name))[:1]
    good, verify = (checkpoint / path).read_bytes(), _plan.verify
    for back in (True, False):

        def verify_beside_a_writer(*args, back=back, **options):
            found = verify(*args, **options)
            swap(checkpoint, {path: good}, wrong=True)
            if back:
                swap(checkpoint, {path: good}, wrong=False)
            return found

        monkeypatch.setattr(_plan, "verify", verify_beside_a_writer)
        with pytest.raises(PublishError, match="changed after it was verified"):
            plan_publish(built[0], checkpoint, Target(NAME))
        swap(checkpoint, {path: good}, wrong=False)


@pytest.mark.parametrize("folder", ["checkpoint", "adapter"])
def test_an_adapter_is_proven_against_what_was_planned(built, out, folder):
    checkpoint = plan_publish(built[0], out / "checkpoint", Target(NAME))
    files = files_of(out / folder)
    name = ADAPTER_WEIGHTS if folder == "adapter" else "abliterator/record.json"
    swap(out / folder, {name: files[name]}, wrong=True)
    with pytest.raises(PublishError):
        plan_adapter(checkpoint, out / "adapter", Target(LORA))


def test_a_swap_by_a_link_is_seen(built, out, tmp_path, monkeypatch):
    path, verify = out / "checkpoint" / "config.json", _plan.verify
    for name in ("good", "other"):
        (tmp_path / name).write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "good")

    def verify_beside_a_writer(*args, **options):
        for name in ("other", "good"):
            (tmp_path / "new").symlink_to(tmp_path / name)
            (tmp_path / "new").replace(path)
        return verify(*args, **options)

    monkeypatch.setattr(_plan, "verify", verify_beside_a_writer)
    with pytest.raises(FileError, match="is a link"):
        plan_publish(built[0], out / "checkpoint", Target(NAME))


# ---- a commit that is not what was sent


def test_a_first_commit_that_arrives_damaged_leaves_the_history(hub, out, publish):
    hub.faults.append(Fault(f"POST {API}/commit/main", "damage"))
    error = publish(public=True)["error"]
    assert "differ by hash" in error
    assert "taken out of the history" in error
    require_only(hub, files_of(out / "checkpoint"))
    repo = hub.repo("model", NAME)
    assert (repo.private, set(repo.refs)) == (True, {"main"})
    sent = sum("PUT /lfs/" in f"{method} {path}" for method, path in hub.requests)
    assert publish(public=True)["public"] is True
    require_only(hub, files_of(out / "checkpoint"))
    assert sum("PUT /lfs/" in f"{method} {path}" for method, path in hub.requests) == sent


AFTERWARDS = (f"GET {API}", "POST", "DELETE")


@pytest.mark.parametrize("request_", AFTERWARDS)
def test_a_damaged_commit_whose_run_ended_there(hub, out, publish, request_):
    """Nothing more came through: the next run takes it out of the history."""
    hub.faults.append(Fault(f"POST {API}/commit/main", "damage"))
    dead = [Fault(prefix, 403, times=99) for prefix in (request_,)]

    def on_request() -> None:
        if any("/commit/" in path for _, path in hub.requests[:-1]) and dead:
            hub.faults.extend(dead)
            dead.clear()

    hub.on_request = on_request
    assert "error" in publish(public=True)
    assert hub.repo("model", NAME).private
    hub.on_request = lambda: None
    hub.faults.clear()
    answer = publish(public=True)
    assert answer["public"] is True
    require_only(hub, files_of(out / "checkpoint"))
    repo = hub.repo("model", NAME)
    assert repo.refs == {"main": answer["commit"]}


def test_a_damaged_commit_on_top_of_older_contents_bars_the_way_to_the_public(hub, out, publish):
    """The older contents would go with it, so it is a person who decides."""
    publish()
    first = on_hub(hub)
    repo = hub.repo("model", NAME)
    for shard in [path for path in first if path.endswith(".safetensors")]:
        hub.commit("model", NAME, {**on_hub(hub), shard: b"an older build's"})
    hub.faults.append(Fault(f"POST {API}/commit/main", "damage"))
    error = publish(public=True)["error"]
    assert "super_squash_history" in error
    answer = publish(public=True)
    assert "super_squash_history" in answer["error"]
    assert repo.private
    assert "error" not in publish()  # private it may stay
    hub.commit("model", NAME, repo.commits[repo.refs.pop("main")])  # the person squashes
    assert publish(public=True)["public"] is True
    require_only(hub, first)
    assert set(repo.refs) == {"main"}


def test_another_branch_that_was_never_proven_bars_it_too(hub, publish):
    publish(revision="drafts")
    repo = hub.repo("model", NAME)
    repo.refs["abliterator-unverified-drafts"] = repo.refs["main"]
    assert "abliterator-unverified-drafts" in publish(public=True)["error"]
    assert repo.private
    assert publish(revision="drafts", public=True)["public"] is True
