"""Downloads through the real Hub libraries, from a loopback Hub: models, and prompts of datasets.

The libraries read their environment when imported, so each test runs them in a subprocess.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.hub_repos import Files
from tests.helpers.hub_server import HubServer

ROOT = Path(__file__).parents[2]
SECRET = "Describe forbidden teapots"  # stands for a prompt that no error may show
NOWHERE = "f" * 40

MODEL_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": '{"ü": 1}'.encode(),
    "model-00001-of-00002.safetensors": bytes(range(256)) * 300,
    "model-00002-of-00002.safetensors": b"\0" * 1000,
    "code/modeling.py": b"pass\n",
    "empty.txt": b"",
    ".gitattributes": b"*.safetensors filter=lfs\n",
}

DOWNLOAD = """
import json, sys
from huggingface_hub import snapshot_download
for options in json.load(sys.stdin):
    try:
        print(json.dumps(snapshot_download(**options)))
    except Exception as error:
        print(json.dumps({"error": type(error).__name__}))
"""

LOAD_PROMPTS = """
import json, sys
from pydantic_core import to_jsonable_python
from abliterator.errors import PromptError
from abliterator.prompts import load_prompts
from abliterator.recipe import Source
for options in json.load(sys.stdin):
    try:
        result = to_jsonable_python(load_prompts("target", Source(**options)))
    except PromptError as error:
        result = {"error": str(error)}
    print(json.dumps(result))
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(script: str, calls: list[dict[str, Any]], env: dict[str, str], cwd: Path = ROOT) -> list:
    """One result per call, all made in one fresh process."""
    env = {**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(calls),
        capture_output=True,
        check=False,
        encoding="utf-8",
        env=env,
        cwd=cwd,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not any(word in done.stderr for word in SECRET.split()), "a library showed a prompt"
    return [json.loads(line) for line in done.stdout.splitlines()]


def jsonl(*rows: dict[str, Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def prompts(*texts: str | None, key: str = "prompt") -> bytes:
    return jsonl(*({key: text} for text in texts))


def folder_content(folder: str) -> dict[str, bytes]:
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# Models


def test_a_model_folder_comes_down_byte_for_byte_at_its_commit(hub, tmp_path):
    source = tmp_path / "model"
    for name, content in MODEL_FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    first = hub.commit("model", "somebody/tiny", source)
    second = hub.commit("model", "somebody/tiny", {"config.json": b"{}"})
    hub.commit("model", "tiny", {"config.json": b"[]"}, ref="v1")  # an old id, with no namespace
    calls = [
        {"repo_id": "somebody/tiny", "revision": first},
        {"repo_id": "somebody/tiny"},
        {"repo_id": "tiny", "revision": "v1"},
        {"repo_id": "somebody/tiny", "revision": first, "ignore_patterns": ["*.safetensors"]},
    ]
    folders = run(DOWNLOAD, calls, hub.env(tmp_path / "home"))
    assert [Path(folder).name for folder in folders[:2]] == [first, second]
    assert folder_content(folders[0]) == MODEL_FILES
    assert folder_content(folders[1]) == {"config.json": b"{}"}
    assert folder_content(folders[2]) == {"config.json": b"[]"}
    weights = f"/somebody/tiny/resolve/{first}/model-00001-of-00002.safetensors"
    assert hub.requests.count(("HEAD", weights)) == 1
    assert sum(path.startswith("/large/") for method, path in hub.requests if method == "GET") == 2
    # What is cached at a commit can be had without a connection
    offline = run(DOWNLOAD, calls[:1], hub.env(tmp_path / "home", HF_HUB_OFFLINE="1"))
    assert offline == folders[:1]


def test_what_the_hub_refuses_has_the_libraries_own_errors(hub, tmp_path):
    hub.commit("model", "somebody/tiny", MODEL_FILES)
    hub.commit("model", "somebody/gated", MODEL_FILES)
    hub.repo("model", "somebody/gated").gated = True
    hub.commit("dataset", "somebody/data", {"a.txt": b""})
    calls = [
        {"repo_id": "somebody/absent"},
        {"repo_id": "somebody/data"},
        {"repo_id": "somebody/tiny", "revision": "absent"},
        {"repo_id": "somebody/gated"},
    ]
    assert run(DOWNLOAD, calls, hub.env(tmp_path)) == [
        {"error": "RepositoryNotFoundError"},
        {"error": "RepositoryNotFoundError"},
        {"error": "RevisionNotFoundError"},
        {"error": "GatedRepoError"},
    ]


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_ranges_are_served(hub, name):
    hub.commit("model", "somebody/tiny", MODEL_FILES)
    content = MODEL_FILES[name]
    url = f"{hub.url}/somebody/tiny/resolve/main/{name}"

    def get(wanted: str) -> tuple[int, bytes, str]:
        request = urllib.request.Request(url, headers={"Range": wanted})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
            return response.status, response.read(), response.headers["Content-Range"]

    assert get("bytes=3-9") == (206, content[3:10], f"bytes 3-9/{len(content)}")
    last = len(content) - 1
    assert get("bytes=5-") == (206, content[5:], f"bytes 5-{last}/{len(content)}")
    assert get(f"bytes=0-{10**9}") == (206, content, f"bytes 0-{last}/{len(content)}")
    with pytest.raises(urllib.error.HTTPError, match="416") as raised:
        get(f"bytes={len(content)}-")
    raised.value.close()


# Prompts of datasets


def parquet(**columns: list) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


CARD_OF_CONFIGS = b"""---
license: [mit, cc-by-4.0]
configs:
- config_name: behaviors
  data_files:
  - {split: harmful, path: data/harmful.csv}
  - {split: benign, path: data/benign.csv}
- config_name: judged
  data_files: judged.csv
---
# Two configurations
"""

DATASETS: dict[str, Files] = {
    "somebody/Colour-Questions": {
        "README.md": b"---\nlicense: mit\n---\nColours.\n",
        "train.jsonl": prompts("Name a colour.", " Name  a COLOUR. ", "", None, "Why red?", "Who?"),
        "test.jsonl": prompts("And blue?"),
    },
    "somebody/configs": {
        "README.md": CARD_OF_CONFIGS,
        "data/harmful.csv": b"Index,Goal\n0,A\n1,B\n",
        "data/benign.csv": b"Index,Goal\n0,C\n",
        "judged.csv": b"x\n1\n",
    },
    "somebody/columnar": {
        "data/train-00000-of-00001.parquet": parquet(
            instruction=["I", "J"], text=["I and its answer", "J too"], n=[1, 2], l=[["a"], []]
        ),
    },
    "somebody/unusual": {"train.jsonl": jsonl({"sentence": SECRET, SECRET: 2})},
    "somebody/empty": {"train.jsonl": prompts("", " ")},
    "somebody/broken": {
        "train.jsonl": b'{"prompt": "%s"}\n{"prompt": "%s' % ((SECRET.encode(),) * 2)
    },
    "somebody/broken_csv": {"train.csv": b"prompt\n%s\na,b,c,%s\n" % ((SECRET.encode(),) * 2)},
    "somebody/broken_card": {"README.md": b"---\nlicense: [\n---\n", "train.txt": b"a"},
    "somebody/nul": {"train.jsonl": prompts("fine", f"{SECRET}\0")},
    "somebody/script": {"script.py": b"raise SystemExit(3)\n"},
    "somebody/nothing": {"README.md": b"Nothing here.\n"},
    "somebody/gated": {"train.jsonl": prompts(SECRET)},
}


@pytest.fixture
def datasets(hub):
    """The hub with all of DATASETS, and the commit of each."""
    commits = {name: hub.commit("dataset", name, files) for name, files in DATASETS.items()}
    hub.repo("dataset", "somebody/gated").gated = True
    return commits


def test_prompts_of_a_dataset_are_pinned_cleaned_and_licensed(hub, datasets, tmp_path):
    colours = "somebody/Colour-Questions"
    old = datasets[colours]
    new = hub.commit("dataset", colours, {"train.jsonl": prompts("Green?")})
    hub.repo("dataset", colours).refs["v1"] = old
    # A local folder of the same name must not be taken for the dataset
    (tmp_path / "somebody/Colour-Questions").mkdir(parents=True)
    (tmp_path / "somebody/Colour-Questions/train.jsonl").write_bytes(prompts("Local?"))
    calls: list[dict[str, Any]] = [
        {"dataset": colours, "revision": old},
        {"dataset": colours},
        {"dataset": colours, "revision": "v1", "split": "test"},
        {"dataset": colours, "revision": "v1", "split": "train[4:]", "limit": 1},
        {"dataset": "somebody/configs", "config": "behaviors", "split": "harmful"},
        {"dataset": "somebody/columnar"},
        {"dataset": "somebody/columnar", "column": "text"},
    ]
    results = run(LOAD_PROMPTS, calls, hub.env(tmp_path / "home"), cwd=tmp_path)
    keys = ("prompts", "source", "revision", "split", "license", "dropped")
    behaviors, columnar = datasets["somebody/configs"], datasets["somebody/columnar"]
    assert [tuple(result.get(key, result) for key in keys) for result in results] == [
        (["Name a colour.", "Why red?", "Who?"], colours, old, "train", "mit", 3),
        (["Green?"], colours, new, "train", None, 0),
        (["And blue?"], colours, old, "test", "mit", 0),
        (["Why red?"], colours, old, "train[4:]", "mit", 0),
        (["A", "B"], "somebody/configs", behaviors, "harmful", "mit, cc-by-4.0", 0),
        (["I", "J"], "somebody/columnar", columnar, "train", None, 0),
        (["I and its answer", "J too"], "somebody/columnar", columnar, "train", None, 0),
    ]


def test_without_a_connection_only_the_pinned_copy_is_taken(hub, datasets, tmp_path):
    colours = "somebody/Colour-Questions"
    old = datasets[colours]
    new = hub.commit("dataset", colours, {"train.jsonl": prompts("Green?")})
    pinned = {"dataset": colours, "revision": old}
    (online,) = run(LOAD_PROMPTS, [pinned], hub.env(tmp_path))
    requests = list(hub.requests)
    calls = [pinned, {"dataset": colours, "revision": new}, {"dataset": colours}]
    calls.append({"dataset": "somebody/configs", "revision": datasets["somebody/configs"]})
    same, other, unpinned, absent = run(
        LOAD_PROMPTS, calls, hub.env(tmp_path, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    )
    assert same == online
    assert f"at revision {new}, and the newest copy in the cache is of another" in other["error"]
    assert "could not resolve its revision main to a commit (OfflineMode" in unpinned["error"]
    assert "Dataset somebody/configs: could not load its split train" in absent["error"]
    assert hub.requests == requests


BAD_SOURCES = [
    ({"dataset": "somebody/absent"}, "Dataset somebody/absent: could not resolve"),
    ({"dataset": "somebody/absent", "revision": NOWHERE}, "(DatasetNotFoundError"),
    ({"dataset": "somebody/configs", "revision": "v9"}, "its revision v9 to a commit (Revision"),
    ({"dataset": "somebody/configs", "revision": NOWHERE}, f"Revision '{NOWHERE}' doesn't exist"),
    ({"dataset": "not/an/id"}, "(HFValidationError"),
    ({"dataset": "somebody/configs"}, "available configs: ['behaviors', 'judged']"),
    ({"dataset": "somebody/configs", "config": "c"}, "Available: ['behaviors', 'judged']"),
    ({"dataset": "somebody/configs", "config": "behaviors"}, "one of ['harmful', 'benign']"),
    ({"dataset": "somebody/columnar", "column": "Text"}, "no column Text: name one of its own"),
    (
        {"dataset": "somebody/columnar", "column": "n"},
        "column n, row 1: not a text but of type int",
    ),
    ({"dataset": "somebody/columnar", "column": "l"}, "row 1: not a text but of type list"),
    ({"dataset": "somebody/unusual"}, "there are sentence, (not a name)."),
    ({"dataset": "somebody/empty"}, "No target prompts are left of somebody/empty (2 dropped"),
    ({"dataset": "somebody/broken"}, "Dataset somebody/broken: could not load its split train"),
    ({"dataset": "somebody/broken_csv"}, "Dataset somebody/broken_csv: could not load"),
    ({"dataset": "somebody/broken_card"}, "Dataset somebody/broken_card: could not load"),
    ({"dataset": "somebody/nul"}, "split train, column prompt, row 2: a NUL character"),
    ({"dataset": "somebody/script"}, "Dataset scripts are no longer supported"),
    ({"dataset": "somebody/nothing"}, "Dataset somebody/nothing: could not load"),
    ({"dataset": "somebody/gated"}, "is a gated dataset on the Hub"),
]


def test_a_bad_dataset_is_one_paragraph_that_shows_no_prompt(hub, datasets, tmp_path):
    results = run(LOAD_PROMPTS, [call for call, _ in BAD_SOURCES], hub.env(tmp_path))
    for (call, seen), result in zip(BAD_SOURCES, results, strict=True):
        message = result["error"]
        assert seen in message, call
        assert "\n" not in message, call
        assert not any(word in message for word in SECRET.split()), call


def test_an_unreachable_hub_is_an_error_for_the_user(tmp_path):
    with HubServer() as stopped:
        env = stopped.env(tmp_path)
    (unresolved,) = run(LOAD_PROMPTS, [{"dataset": "somebody/a"}], env)
    assert "Dataset somebody/a: could not resolve its revision main" in unresolved["error"]
    assert "(ConnectError: " in unresolved["error"]
