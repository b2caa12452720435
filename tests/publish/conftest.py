"""A whole build on a tiny model, a Hub on loopback, and a process that publishes to it.

huggingface_hub reads its environment when imported, so publishing is done by other processes: most
of it by one that stays.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from abliterator import pipeline
from abliterator.card import render_adapter_card, render_card
from abliterator.pipeline import Options
from abliterator.publish._files import HELD_BYTES
from abliterator.recipe import load_recipe
from abliterator.record import RunRecord
from tests.helpers.hub_server import HubServer

ROOT = Path(__file__).parents[2]
TOKEN = "hf_teapotsAreSecret0123456789abcdef"
NAME = "somebody/tiny"
README = "---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n"

PUBLISH = """
import json, sys, time
from pathlib import Path
slept = []
time.sleep = slept.append
from abliterator.errors import PublishError
from abliterator.publish import Target, _files, _publish, plan_adapter, plan_publish, publish
_publish.check_loads = lambda plan: None  # one test of its own loads
for line in sys.stdin:
    asked = json.loads(line)
    target = Target(**asked["target"])
    slept.clear()
    _files.HELD_BYTES = asked["held"]
    try:
        plan = plan_publish(Path(asked["base"]), Path(asked["out"]) / "checkpoint", target)
        if asked["adapter"]:
            plan = plan_adapter(plan, Path(asked["out"]) / "adapter", target)
        result = publish(plan).model_dump()
    except PublishError as error:
        result = {"error": str(error)}
    print(json.dumps({**result, "slept": slept}), flush=True)
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory, tiny_folder) -> tuple[Path, Path]:
    """(base, OUT) of a whole build on a tiny model in shards; not to be written to."""
    return build(tmp_path_factory.mktemp("built"), tiny_folder)


def build(folder: Path, tiny_folder, *overrides: str) -> tuple[Path, Path]:
    """(base, OUT) in `folder`, with checkpoint and adapter."""
    base = Path(shutil.copytree(tiny_folder("llama", shard_size="50KB"), folder / "base"))
    (base / "README.md").write_text(README)
    for name, question in (("target", "Tell me about"), ("neutral", "Name")):
        things = ("river", "bridge", "wall", "market", "square", "port", "gate")
        (folder / f"{name}.txt").write_text("\n".join(f"{question} the {x}." for x in things))
    (folder / "tiny.yaml").write_text(
        f"model: {base}\nlayers: [2]\nk: 1\n"
        "edit: {output: both}\nrollouts: {max_new_tokens: 3}\n"
        "prompts: {target: {path: target.txt}, neutral: {path: neutral.txt}}\n"
    )
    out = folder / "out"
    options = Options(device="cpu", dtype="float32")
    recipe = load_recipe(folder / "tiny.yaml", overrides=overrides)
    pipeline.build(recipe, out, options=options)
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
    server.xet_store, server.on_request = None, lambda: None
    server.xet_hashes.clear()
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

    def call(
        *,
        alone: dict[str, str] | None = None,
        adapter: bool = False,
        held: int = HELD_BYTES,
        **target: Any,
    ) -> dict[str, Any]:
        asked = {
            "held": held,
            "base": str(built[0]),
            "out": str(out),
            "adapter": adapter,
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
    """Another base in the record, and the cards that are rendered of it."""
    path = out / "checkpoint" / "abliterator" / "record.json"
    record = json.loads(path.read_text())
    record["model"] |= model
    path.write_text(json.dumps(record))
    made = RunRecord.model_validate(record)
    (out / "checkpoint" / "README.md").write_text(render_card(made))
    (out / "adapter" / "README.md").write_text(render_adapter_card(made))


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def on_hub(hub: HubServer, revision: str = "main", *, name: str = NAME) -> dict[str, bytes]:
    repo = hub.repo("model", name)
    files = dict(repo.commits[repo.refs[revision]])
    files.pop(".gitattributes", None)
    return files


def commits(hub: HubServer) -> int:
    return sum(m == "POST" and "/commit/" in path for m, path in hub.requests)


def require_only(hub: HubServer, wanted: dict[str, bytes], *, name: str = NAME) -> None:
    """No commit that a branch or tag leads to has other bytes than these."""
    for repo in hub.repos:
        for ref in repo.refs if repo.id == name else ():
            for commit in repo.history(ref):
                for path, content in repo.commits[commit].items():
                    assert path == ".gitattributes" or wanted[path] == content, (ref, path)
