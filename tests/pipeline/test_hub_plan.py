"""A plan of a model on the Hub: of its weights, only the headers come over the network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from abliterator import pipeline
from abliterator.errors import FileError
from tests.helpers.hub_repos import Fault, Unseen
from tests.helpers.hub_server import HubServer
from tests.test_public_api import HEAVY

ROOT = Path(__file__).parents[2]
MEBIBYTE = 1 << 20

PLAN = """
import json, os, sys, tempfile
from pathlib import Path
from abliterator import pipeline
from abliterator.errors import FileError
for model in sys.argv[1:]:
    try:
        plan = pipeline.plan_model(model, Path("out"))
        told = plan.summary()
    except FileError as error:
        assert error.__cause__ is None and error.__context__ is None
        told = str(error)
    print(json.dumps(told))
print(json.dumps([name for name in HEAVY if name in sys.modules]))
print(json.dumps(os.listdir(tempfile.gettempdir())))
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def plans(hub: HubServer, home: Path, *models: str, **environment: str) -> list:
    """The summaries or errors of these models, all planned in one fresh process."""
    scratch = home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {HEAVY!r}\n{PLAN}", *models],
        cwd=home,
        env=hub.env(home, PYTHONPATH=str(ROOT), TMPDIR=str(scratch), **environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *told, heavy, left_behind = map(json.loads, done.stdout.splitlines())
    assert (heavy, left_behind) == ([], [])
    return told


def comparable(summary: dict) -> dict:
    """A summary without what differs between a folder and the Hub, or from minute to minute."""
    same = {name: value for name, value in summary.items() if name not in ("model", "revision")}
    return same | {
        part: {name: value for name, value in summary[part].items() if name != "free"}
        for part in ("bytes", "where")
    }


def sent_of_weights(hub: HubServer) -> int:
    return sum(count for path, count in hub.sent.items() if path.startswith("/large/"))


def header_bytes(folder: Path) -> int:
    """Bytes of the headers of all weight files, with the eight of their lengths."""
    return sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors")
    )


@pytest.mark.parametrize(("shard_size", "sharded"), [("5GB", False), ("30KB", True)])
def test_a_plan_fetches_headers_and_says_what_the_folder_says(
    hub, tiny_folder, tmp_path, shard_size, sharded
):
    folder = tiny_folder("llama", shard_size=shard_size)
    files = list(folder.glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    commit = hub.commit("model", "somebody/tiny", folder)
    (told,) = plans(hub, tmp_path, "somebody/tiny")
    assert (told["model"], told["revision"]) == ("somebody/tiny", commit)
    assert comparable(told) == comparable(pipeline.plan_model(str(folder), tmp_path).summary())
    assert told["files"]["carried"]
    assert sent_of_weights(hub) == header_bytes(folder)
    assert header_bytes(folder) < sum(path.stat().st_size for path in files) / 20
    fetched = {path.rsplit("/", 1)[-1] for path in hub.sent if "/resolve/" in path}
    small = {"config.json", "model.safetensors.index.json", "tokenizer_config.json"}
    assert fetched <= small
    assert not hub.leaked_tokens


def test_weights_of_gigabytes_take_no_time_and_no_room(hub, tmp_path):
    """The size is a claim of the Hub's listing that the header bears out; the bytes are absent."""
    shape = [1 << 15, 1 << 15]
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 << 30]}}
    ).encode()
    start = len(header).to_bytes(8, "little") + header
    content = Unseen(start)
    content.sha256, content.size = "0" * 64, len(start) + (4 << 30)
    hub.commit("model", "somebody/large", {"config.json": b"{}", "model.safetensors": content})
    code = (
        "from abliterator.source import headers_folder\n"
        "from abliterator.checkpoint import Checkpoint\n"
        "with headers_folder('somebody/large', revision=None) as source:\n"
        "    checkpoint = Checkpoint.open(source.folder)\n"
        "    blocks = (source.folder / 'model.safetensors').stat().st_blocks\n"
        "print(checkpoint.total_bytes, checkpoint.shapes, blocks * 512 < 1 << 20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.env(tmp_path, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == f"{content.size} {{'w': {tuple(shape)}}} True\n", done.stderr


def test_what_is_whole_in_the_cache_is_used_as_it_is(hub, tiny_folder, tmp_path):
    folder = tiny_folder()
    hub.commit("model", "somebody/tiny", folder)
    code = "from abliterator.source import resolve_folder as r; r('somebody/tiny', revision=None)"
    environment = hub.env(tmp_path, PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    hub.sent.clear()
    (told,) = plans(hub, tmp_path, "somebody/tiny")
    assert not any("/resolve/" in path or path.startswith("/large/") for path in hub.sent)
    (offline,) = plans(hub, tmp_path, "somebody/tiny", HF_HUB_OFFLINE="1")
    assert comparable(offline) == comparable(told)
    # once there is a newer commit, that is what a build would take
    newer = hub.commit("model", "somebody/tiny", folder)
    assert plans(hub, tmp_path, "somebody/tiny")[0]["revision"] == newer
    assert sent_of_weights(hub) == header_bytes(folder)


def test_the_plan_of_a_model_on_the_hub_has_no_weights_to_read(hub, tiny_folder, tmp_path):
    hub.commit("model", "somebody/tiny", tiny_folder())
    code = (
        "from pathlib import Path\n"
        "from abliterator import pipeline\n"
        "from abliterator.errors import FileError\n"
        "checkpoint = pipeline.plan_model('somebody/tiny', Path('out')).checkpoint\n"
        "try: checkpoint.read(next(iter(checkpoint.tensors)))\n"
        "except FileError as error: print(error)\n"
    )
    environment = hub.env(tmp_path, PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "somebody/tiny/model" in done.stdout, done.stderr


def test_what_cannot_be_planned_is_named(hub, tiny_folder, tmp_path):
    folder = tiny_folder()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = next(name for name in files if name.endswith(".safetensors"))
    hub.commit("model", "somebody/gated", files)
    hub.repo("model", "somebody/gated").gated = True
    hub.commit("model", "somebody/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.commit("model", "somebody/empty", {"config.json": b"{}", "model.safetensors": b""})
    huge = (10**12).to_bytes(8, "little") + b"{}"
    hub.commit("model", "somebody/huge", {"config.json": b"{}", "model.safetensors": huge})
    hub.commit("model", "somebody/cut", {**files, weights: files[weights][:-1]})
    hub.commit("model", "somebody/outside", {**files, "../../x.json": b"{}"})
    hub.commit("model", "somebody/refused", files)
    refusal = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.faults.append(Fault("GET /api/models/somebody/refused", 401, refusal))
    commit = hub.commit("model", "somebody/broken", files)
    hub.faults.append(Fault(f"GET /somebody/broken/resolve/{commit}/{weights}", 0))
    expected = {
        "somebody/absent": "was found neither as a folder nor on the Hub",
        "somebody/gated": "is gated. Accept its terms",
        "somebody/pickled": "only pytorch_model.bin, which can run code",
        "somebody/empty": "somebody/empty/model.safetensors is damaged: it has 0 bytes",
        "somebody/huge": "header claims 1000000000000 bytes",
        "somebody/cut": "it is truncated",
        "somebody/outside": "not a plain path inside it",
        "somebody/refused": "does not know the token",
        "somebody/broken": "the Hub cannot be reached",
        "not a model": "neither a folder nor an id",
    }
    told = plans(hub, tmp_path, *expected)
    for message, (model, words) in zip(told, expected.items(), strict=True):
        assert words in message, (model, message)


def test_a_server_that_sends_whole_files_is_left_before_it_has(hub, tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(), folder)
    weights = next(folder.glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.truncate(64 * MEBIBYTE)
    hub.commit("model", "somebody/tiny", folder)
    hub.ranges = False
    (told,) = plans(hub, tmp_path, "somebody/tiny")
    assert "did not send the part" in told
    assert "HTTP 200, 0 of 8 bytes taken" in told
    assert sent_of_weights(hub) < 16 * MEBIBYTE  # what the sockets hold


def test_without_a_connection_what_is_missing_is_named():
    with pytest.raises(FileError, match="nobody/nothing is not on this machine"):
        pipeline.plan_model("nobody/nothing", Path("out"))


def test_the_command_plans_a_recipe_at_its_revision(hub, tiny_folder, tmp_path):
    commit = hub.commit("model", "somebody/tiny", tiny_folder())
    hub.commit("model", "somebody/tiny", {"config.json": b"{}", "model.bin": b"x"})
    (tmp_path / "hub.yaml").write_text(
        f"{{model: somebody/tiny, revision: {commit}, layers: [2], k: 1,"
        " prompts: {target: {dataset: s/a}, evaluation: {dataset: s/b}, neutral: {dataset: s/c}}}"
    )
    done = subprocess.run(
        [sys.executable, "-m", "abliterator", "plan", "hub.yaml", "--json"],
        cwd=tmp_path,
        env=hub.env(tmp_path / "home", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["model"], told["revision"], told["layers"]) == ("somebody/tiny", commit, [2])
    assert sent_of_weights(hub) == header_bytes(tiny_folder())
