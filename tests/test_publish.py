"""Publishing to a Hub on loopback, through the real huggingface_hub.

The library reads its environment when imported, so publishing is done by other processes: most of
it by one that stays.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from abliterator import pipeline
from abliterator.errors import PublishError
from abliterator.pipeline import Options
from abliterator.publish import Target, plan_publish
from abliterator.publish._load import check_loads
from abliterator.recipe import load_recipe
from tests.hub_server import Fault, HubServer

ROOT = Path(__file__).parents[1]
TOKEN = "hf_teapotsAreSecret0123456789abcdef"
NAME = "somebody/tiny"
README = "---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n"

PUBLISH = """
import json, sys, time
from pathlib import Path
slept = []
time.sleep = slept.append
from abliterator.errors import PublishError
from abliterator.publish import Target, _hub, plan_publish, publish
_hub.check_loads = lambda plan: None  # one test of its own loads
for line in sys.stdin:
    asked = json.loads(line)
    target = Target(**asked["target"])
    slept.clear()
    try:
        plan = plan_publish(Path(asked["base"]), Path(asked["checkpoint"]), target)
        result = publish(plan).to_json()
    except PublishError as error:
        result = {"error": str(error)}
    print(json.dumps({**result, "slept": slept}), flush=True)
"""

LOAD = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
stored, loaded = load_file(sys.argv[2]), model.state_dict()
assert stored.keys() <= loaded.keys()
assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
print(len(stored))
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory, tiny_folder) -> tuple[Path, Path]:
    """(base, OUT) of a whole build on a tiny model; not to be written to."""
    folder = tmp_path_factory.mktemp("built")
    base = Path(shutil.copytree(tiny_folder("llama"), folder / "base"))
    (base / "README.md").write_text(README)
    for name, question in (("target", "Tell me about"), ("neutral", "Name")):
        things = ("river", "bridge", "wall", "market", "square", "port", "gate")
        (folder / f"{name}.txt").write_text("\n".join(f"{question} the {x}." for x in things))
    (folder / "tiny.yaml").write_text(
        f"model: {base}\nlayers: [2]\nk: 1\nrollouts: {{max_new_tokens: 3}}\n"
        "prompts: {target: {path: target.txt}, neutral: {path: neutral.txt}}\n"
    )
    out = folder / "out"
    options = Options(device="cpu", dtype="float32")
    pipeline.build(load_recipe(folder / "tiny.yaml"), out, options=options)
    return base, out


@pytest.fixture
def out(built, tmp_path) -> Path:
    """A copy of the built OUT that the test may change."""
    return Path(shutil.copytree(built[1], tmp_path / "out"))


@pytest.fixture(scope="session")
def server():
    with HubServer() as hub:
        hub.token = TOKEN
        yield hub


@pytest.fixture
def hub(server):
    """An empty Hub."""
    for held in (server.repos, server.requests, server.faults, server.store):
        held.clear()
    server.xet_store = None
    return server


@pytest.fixture(scope="session")
def publisher(server, tmp_path_factory):
    """A process that publishes what a line of its input asks for."""
    folder = tmp_path_factory.mktemp("publisher")
    env = environment(server, folder, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    command = [sys.executable, "-c", PUBLISH]
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
        )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(asked: dict[str, Any]) -> str:
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        said = (folder / "stderr").read_text()
        assert answer, said
        assert TOKEN not in answer + said
        return answer

    yield ask
    process.stdin.close()
    process.stdout.close()
    process.wait(timeout=60)


@pytest.fixture
def publish(hub, built, out, publisher, tmp_path):
    """`publish(**target)`: what a call of the room gives; `alone` in a process of its own."""

    def call(*, alone: dict[str, str] | None = None, **target: Any) -> dict[str, Any]:
        asked = {
            "base": str(built[0]),
            "checkpoint": str(out / "checkpoint"),
            "target": {"repo_id": NAME, **target},
        }
        if alone is None:
            return json.loads(publisher(asked))
        env = environment(hub, tmp_path / "home", **alone)
        done = run([sys.executable, "-c", PUBLISH], env, json.dumps(asked))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return call


def environment(hub: HubServer, home: Path, **extra: str) -> dict[str, str]:
    return {**hub.env(home, **extra), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(
    command: list[str], env: dict[str, str], asked: str = ""
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        input=asked,
        env=env,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=200,
    )
    assert TOKEN not in done.stdout + done.stderr
    return done


def edit_record(out: Path, **model: Any) -> None:
    path = out / "checkpoint" / "abliterator" / "record.json"
    record = json.loads(path.read_text())
    record["model"] |= model
    path.write_text(json.dumps(record))


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def on_hub(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    repo = hub.repo("model", NAME)
    files = dict(repo.commits[repo.refs[revision]])
    files.pop(".gitattributes", None)
    return files


def commits(hub: HubServer) -> int:
    return sum(m == "POST" and "/commit/" in path for m, path in hub.requests)


# ---- the whole way


@pytest.mark.slow
def test_the_command_publishes_what_plain_transformers_then_loads(hub, built, out, tmp_path):
    env = environment(hub, tmp_path / "home", HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    command = [sys.executable, "-m", "abliterator", "push", str(out), "--repo-id", "tiny", "--json"]
    done = run(command, env)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["repo_id"] == NAME
    assert told["public"] is False
    assert on_hub(hub) == files_of(out / "checkpoint")
    assert set(told["uploaded"]) == set(on_hub(hub))
    assert hub.repo("model", NAME).private
    assert commits(hub) == 1
    assert hub.leaked_tokens == []
    weights = out / "checkpoint" / "model.safetensors"
    loaded = run([sys.executable, "-c", LOAD, NAME, str(weights)], env)
    assert loaded.stdout.strip() == str(len(load_file(weights))), loaded.stderr


def test_a_dry_run_asks_the_hub_nothing(hub, built, out, tmp_path):
    (out / "checkpoint" / "rollouts.jsonl").write_text("private")
    command = [sys.executable, "-m", "abliterator", "publish", str(out), "--repo-id", NAME]
    done = run(
        [*command, "--dry-run", "--public"], environment(hub, tmp_path / "home", HF_TOKEN=TOKEN)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{NAME}: public, gated: as the base is, branch main\n")
    assert "not uploaded, not ours: rollouts.jsonl" in done.stdout
    for name, content in files_of(built[1] / "checkpoint").items():
        assert re.search(rf" {len(content):,}  [0-9a-f]{{12}}  {re.escape(name)}\n", done.stdout)
    assert hub.requests == []


def test_public_comes_last(hub, publish):
    told = publish(public=True)
    assert told["public"] is True
    assert hub.repo("model", NAME).settings == [{"visibility": "public"}]
    order = [path for method, path in hub.requests if method in ("POST", "PUT") or "/tree/" in path]
    at = {
        part: max(i for i, path in enumerate(order) if part in path)
        for part in ("/tree/", "/commit/", "/settings")
    }
    assert at["/commit/"] < at["/tree/"] < at["/settings"]


def test_again_sends_nothing(hub, publish):
    first, second = publish(), publish()
    assert second["uploaded"] == []
    assert set(second["unchanged"]) == set(first["uploaded"])
    assert second["commit"] == first["commit"]
    assert commits(hub) == 1
    third = publish(public=True)
    assert (third["uploaded"], third["public"]) == ([], True)
    assert publish(public=True)["uploaded"] == []  # public already, and nothing to change


def test_only_what_changed_is_sent(hub, out, publish):
    publish()
    (out / "checkpoint" / "README.md").write_text(
        (out / "checkpoint" / "README.md").read_text() + "\n"
    )
    assert publish()["uploaded"] == ["README.md"]
    assert on_hub(hub) == files_of(out / "checkpoint")


def test_branch_tag_and_pull_request(hub, out, publish):
    first = publish(revision="v2", tag="v2.0")
    repo = hub.repo("model", NAME)
    assert repo.refs["v2"] == repo.refs["v2.0"] == first["commit"]
    assert on_hub(hub, "main") == {}
    assert on_hub(hub, "v2") == files_of(out / "checkpoint")
    asked = publish(create_pr=True)
    assert repo.refs["refs/pr/1"] == asked["commit"]
    assert asked["url"].endswith("/discussions/1")
    assert on_hub(hub, "main") == {}


def test_a_tag_that_is_taken_is_left(hub, publish):
    publish(tag="v1")
    hub.repo("model", NAME).refs["v1"] = "f" * 40
    assert "has a tag 'v1' already" in publish(tag="v1", public=True)["error"]
    assert hub.repo("model", NAME).private


def test_gated_like_its_base(hub, out, publish):
    hub.commit("model", "maker/base", {"config.json": b"{}"})
    hub.repo("model", "maker/base").gating = "manual"
    edit_record(out, id="maker/base", revision="f" * 40)
    assert publish()["gated"] == "manual"
    order = [path for _, path in hub.requests]
    assert order.index(f"/api/models/{NAME}/settings") < order.index(
        f"/api/models/{NAME}/preupload/main"
    )
    assert publish(gated="no")["gated"] is False
    assert publish(gated="auto")["gated"] == "auto"


def test_through_xet(hub, out, publish, tmp_path):
    pytest.importorskip("hf_xet")
    hub.xet_store = tmp_path / "xet"
    hub.xet_store.mkdir()
    told = publish(alone={"HF_TOKEN": TOKEN})
    assert set(told["uploaded"]) == set(files_of(out / "checkpoint"))
    assert not any(path.startswith("/lfs/") for _, path in hub.requests)
    assert any(hub.xet_store.rglob("*"))
    assert publish(alone={"HF_TOKEN": TOKEN})["uploaded"] == []


# ---- what may not be published


def test_nothing_is_published_of_what_does_not_verify(hub, out, publish):
    path = out / "checkpoint" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    error = publish(public=True)["error"]
    assert "does not verify" in error
    assert hub.requests == []


def test_a_file_added_by_hand_is_named_and_stays(hub, built, out, publish):
    (out / "checkpoint" / "notes.txt").write_text("private")
    (out / "checkpoint" / ".env").write_text("private")
    plan = plan_publish(built[0], out / "checkpoint", Target(NAME))
    assert plan.left_out == (".env", "notes.txt")
    assert not {"notes.txt", ".env"} & set(publish()["uploaded"])
    assert b"private" not in b"".join(on_hub(hub).values())


def test_pictures_go_along_if_the_record_vouches_for_them(built, out):
    picture = out / "checkpoint" / "abliterator" / "sweep.png"
    picture.write_bytes(b"drawn")
    plan = plan_publish(built[0], out / "checkpoint", Target(NAME))
    assert plan.left_out == ("abliterator/sweep.png",)
    path = out / "checkpoint" / "abliterator" / "record.json"
    record = json.loads(path.read_text())
    record["pictures"] = {"abliterator/sweep.png": hashlib.sha256(b"drawn").hexdigest()}
    path.write_text(json.dumps(record))
    plan = plan_publish(built[0], out / "checkpoint", Target(NAME))
    assert plan.left_out == ()
    assert "abliterator/sweep.png" in {file.path for file in plan.files}
    for damage in (lambda: picture.write_bytes(b"another"), picture.unlink):
        damage()
        with pytest.raises(PublishError, match=r"sweep\.png is not the picture"):
            plan_publish(built[0], out / "checkpoint", Target(NAME))


@pytest.mark.parametrize("name", ["README.md", "recipe.yaml", "abliterator/record.json"])
def test_a_build_that_did_not_end(built, out, name):
    (out / "checkpoint" / name).unlink()
    with pytest.raises(PublishError, match=name):
        plan_publish(built[0], out / "checkpoint", Target(NAME))


@pytest.mark.slow
def test_a_checkpoint_that_does_not_load(built, out):
    plan = plan_publish(built[0], out / "checkpoint", Target(NAME))
    check_loads(plan)
    config = out / "checkpoint" / "config.json"
    config.write_text(
        config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40')
    )
    with pytest.raises(PublishError, match="Plain transformers"):
        check_loads(plan)


def test_an_unknown_licence_must_be_given(hub, built, out, publish):
    edit_record(out, license=None)
    readme = out / "checkpoint" / "README.md"
    readme.write_text(readme.read_text().replace("license: apache-2.0\n", ""))
    assert "--license" in publish()["error"]
    assert hub.requests == []
    publish(license="mit")
    card = ModelCard(on_hub(hub)["README.md"].decode())
    assert card.data.license == "mit"
    assert card.text.strip() == ModelCard(readme.read_text()).text.strip()


def test_a_known_licence_is_not_changed(built, out):
    with pytest.raises(PublishError, match="cannot be given another one"):
        plan_publish(built[0], out / "checkpoint", Target(NAME, license="mit"))
    plan_publish(built[0], out / "checkpoint", Target(NAME, license="apache-2.0"))


@pytest.mark.parametrize("license_id", ["llama3.2", "llama3", "llama4"])
def test_a_llama_is_called_so(built, out, license_id):
    edit_record(out, license=license_id)
    with pytest.raises(PublishError, match="--repo-id somebody/Llama-tiny"):
        plan_publish(built[0], out / "checkpoint", Target(NAME))
    plan_publish(built[0], out / "checkpoint", Target("somebody/Llama-3.2-tiny"))


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "../up", "me/x--y", "me/.git\n", "x" * 97])
def test_names_that_are_none(built, name):
    with pytest.raises(PublishError, match="no name for a repository"):
        plan_publish(built[0], built[1] / "checkpoint", Target(name))


def test_a_repository_of_somebody_elses_files(hub, out, publish):
    hub.commit("model", NAME, {"model.safetensors": b"theirs", "thesis.pdf": b"theirs"})
    hub.repo("model", NAME).private = True
    assert "(model.safetensors, thesis.pdf)" in publish()["error"]
    assert "thesis.pdf" in publish(revision="new")["error"]
    assert list(hub.repo("model", NAME).refs) == ["main"]
    assert commits(hub) == 0
    publish(into_existing=True)
    assert on_hub(hub) == {**files_of(out / "checkpoint"), "thesis.pdf": b"theirs"}


def test_a_branch_with_somebody_elses_files(hub, publish):
    publish()
    hub.commit("model", NAME, {"thesis.pdf": b"theirs"}, ref="drafts")
    assert "thesis.pdf" in publish(revision="drafts")["error"]
    assert publish(revision="other")["uploaded"] == []


def test_a_pull_request_to_a_public_repository(hub, out, publish):
    publish(public=True)
    readme = out / "checkpoint" / "README.md"
    readme.write_text(readme.read_text() + "\n")
    assert "--into-existing" in publish(create_pr=True)["error"]
    assert publish(create_pr=True, into_existing=True)["uploaded"] == ["README.md"]
    assert on_hub(hub)["README.md"] != readme.read_bytes()


def test_a_public_repository_is_not_written_to_unasked(hub, publish):
    publish(public=True)
    assert "is public" in publish()["error"]


def test_new_contents_are_not_shown_before_they_are_checked(hub, out, publish):
    publish(public=True)
    (out / "checkpoint" / "README.md").write_text(
        (out / "checkpoint" / "README.md").read_text() + "\n"
    )
    assert "before they are checked" in publish(public=True)["error"]
    assert commits(hub) == 1
    assert publish(public=True, into_existing=True)["uploaded"] == ["README.md"]


# ---- faults

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
    "damaged": (Fault(f"POST {API}/commit/main", "damage"), "model.safetensors differ by hash"),
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
