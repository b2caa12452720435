"""Where a model lies, and how it gets there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from abliterator.errors import CheckpointError
from abliterator.source import folder_on_disk, resolve_folder
from tests.helpers.hub_server import HubServer

ROOT = Path(__file__).parents[2]


def test_a_folder_resolves_to_itself(tiny_folder):
    source = resolve_folder(str(tiny_folder("llama")), revision=None)
    assert (source.folder, source.revision) == (tiny_folder("llama"), None)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no-such-model-here"])
def test_a_path_to_nothing(name):
    with pytest.raises(CheckpointError, match="is not a folder"):
        resolve_folder(name, revision=None)


def test_a_file_is_not_a_folder(writable):
    with pytest.raises(CheckpointError, match="is not a folder"):
        resolve_folder(str(writable / "config.json"), revision=None)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_conversion(writable, name):
    (writable / "model.safetensors").rename(writable / name)
    with pytest.raises(CheckpointError, match=rf"(?s){name}.*save_pretrained"):
        resolve_folder(str(writable), revision=None)


def test_a_folder_without_weights(writable):
    (writable / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none at all"):
        resolve_folder(str(writable), revision=None)


def test_there_is_one_embedded_model():
    with pytest.raises(CheckpointError, match="embedded:demo"):
        resolve_folder("embedded:other", revision=None)


def test_an_id_that_cannot_be_fetched_is_named():
    with pytest.raises(CheckpointError, match="nobody/nothing is not on this machine"):
        resolve_folder("nobody/nothing", revision=None)


def test_what_is_no_id_either():
    with pytest.raises(CheckpointError, match="neither a folder nor an id"):
        resolve_folder("not a model", revision=None)


RESOLVE = """
import json, sys
from abliterator.errors import CheckpointError
from abliterator.source import resolve_folder
for model, revision in json.load(sys.stdin):
    try:
        source = resolve_folder(model, revision=revision)
        names = sorted(path.name for path in source.folder.iterdir())
        found = [str(source.folder), source.revision, names]
    except CheckpointError as error:
        assert error.__cause__ is None and error.__context__ is None
        found = str(error)
    print(json.dumps(found))
"""


def test_the_hub(tmp_path):
    files = {
        "config.json": b"{}",
        "model.safetensors": b"x",
        "pytorch_model.bin": b"x",
        "consolidated.safetensors": b"x",
        "original/params.json": b"{}",
    }
    with HubServer() as hub:
        commit = hub.commit("model", "somebody/tiny", files)
        hub.commit("model", "somebody/pickled", {"config.json": b"{}", "model.bin": b"x"})
        hub.commit("model", "somebody/gated", files)
        hub.repo("model", "somebody/gated").gated = True
        asked = [
            ("somebody/tiny", None),
            ("somebody/tiny", "v9"),
            ("somebody/pickled", None),
            ("somebody/gated", None),
            ("somebody/absent", None),
        ]
        environment = hub.env(tmp_path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        done = subprocess.run(
            [sys.executable, "-c", RESOLVE],
            input=json.dumps(asked),
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    fetched, no_revision, pickled, gated, absent = map(json.loads, done.stdout.splitlines())
    assert fetched[1:] == [commit, ["config.json", "model.safetensors"]]
    assert "somebody/tiny has no revision 'v9'" in no_revision
    assert "somebody/pickled has no weights in safetensors format" in pickled
    assert "somebody/gated is gated" in gated
    assert "somebody/absent was found neither" in absent


HASHED = """
import json, os, sys
from abliterator.checkpoint import Checkpoint, fingerprint
from abliterator.source import headers_folder, resolve_folder
folder = resolve_folder("somebody/tiny", revision=None).folder
with headers_folder("somebody/tiny", revision=None) as source:
    assert source.folder == folder, "it is in the cache, and no header is fetched"
links = [path.is_symlink() for path in sorted(folder.iterdir())]
print(json.dumps([fingerprint(Checkpoint.open(folder)), links]))
"""


def test_a_cache_without_links_has_the_same_files(tiny_folder, tmp_path):
    """As the Hub's client makes it on Windows: the files themselves lie where links would."""
    fingerprints = []
    with HubServer() as hub:
        hub.commit("model", "somebody/tiny", tiny_folder())
        for disabled in ("0", "1"):
            environment = hub.env(
                tmp_path / disabled, PYTHONPATH=str(ROOT), HF_HUB_DISABLE_SYMLINKS=disabled
            )
            done = subprocess.run(
                [sys.executable, "-c", HASHED], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            hashes, links = json.loads(done.stdout)
            assert set(links) == {disabled == "0"}
            fingerprints.append(hashes)
    assert fingerprints[0] == fingerprints[1]
    assert len(fingerprints[0]) > 3


CACHED = """
import json, sys
from abliterator.source import folder_on_disk, resolve_folder
before = folder_on_disk("somebody/tiny", revision=None)
folder = resolve_folder("somebody/tiny", revision=None).folder
print(json.dumps([before is None, folder_on_disk("somebody/tiny", revision=None) == folder]))
"""


def test_a_folder_on_disk_is_never_downloaded(tiny_folder, tmp_path):
    assert folder_on_disk(str(tiny_folder()), revision=None) == tiny_folder()
    assert folder_on_disk("./nothing", revision=None) is None
    with HubServer() as hub:
        hub.commit("model", "somebody/tiny", tiny_folder())
        environment = hub.env(tmp_path, PYTHONPATH=str(ROOT))
        done = subprocess.run(
            [sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, True]
