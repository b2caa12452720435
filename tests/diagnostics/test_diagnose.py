"""What goes wrong is a line of the diagnosis: broken packages, crashing drivers, refused tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abliterator.diagnostics import Diagnosis
from abliterator.diagnostics._child import DTYPES, device_results, results
from abliterator.diagnostics._diagnose import add_tries
from abliterator.diagnostics._faults import described, without_home
from abliterator.diagnostics._machine import disk
from tests.helpers.hub_server import Fault, HubServer

TOKEN = "hf_" + "x" * 34
REPORT = """
import json
from abliterator.diagnostics._hub import hub
print(json.dumps(vars(hub(online={online}))))
"""


def child(code: str, *lines: dict[str, str]) -> list[str]:
    """A process that prints results, then runs `code`."""
    printed = "".join(f"print({json.dumps(line)!r}, flush=True)\n" for line in lines)
    return [sys.executable, "-c", printed + code]


def outcomes(device: str) -> dict[str, str]:
    return {line["dtype"]: line["outcome"] for line in device_results(device) if "dtype" in line}


def test_every_dtype_is_right_on_the_cpu():
    assert outcomes("cpu") == dict.fromkeys(DTYPES, "ok")


def test_a_wrong_product_is_no_success(monkeypatch):
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: product(a, b) + (a.dtype == torch.bfloat16),
    )
    assert outcomes("cpu")["bfloat16"] == "ArithmeticError: the product is wrong"
    assert outcomes("cpu")["float32"] == "ok"


def test_a_device_that_refuses_is_described():
    tried = outcomes("meta")  # it has tensors, and no numbers in them
    assert list(tried) == list(DTYPES)
    assert all(outcome.startswith("NotImplementedError: ") for outcome in tried.values())


def test_a_torch_that_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    lines = list(results())
    imported = {line["import"]: line["outcome"] for line in lines if "import" in line}
    assert imported["torch"].startswith("ModuleNotFoundError: ")
    assert lines[-1]["fault"].startswith("devices: ModuleNotFoundError: ")


def test_a_crash_is_placed_and_what_came_before_is_kept():
    diagnosis = Diagnosis()
    add_tries(
        diagnosis,
        child(
            "import os; os.abort()",
            {"import": "torch", "outcome": "ok"},
            {"begin": "opening cuda:0", "device": "cuda:0"},
            {"device": "cuda:0", "product": "A Card"},
            {"device": "cuda:0", "dtype": "float32", "outcome": "ok"},
            {"begin": "a matrix product in bfloat16 on cuda:0"},
        ),
    )
    assert diagnosis.imports == {"torch": "ok"}
    (device,) = diagnosis.devices
    assert (device.product, device.products) == ("A Card", {"float32": "ok"})
    (fault,) = diagnosis.faults
    assert fault.startswith("a matrix product in bfloat16 on cuda:0: the process ended with ")
    if sys.platform != "win32":
        assert fault.endswith("signal SIGABRT")


def test_an_exit_code_comes_with_the_last_words():
    diagnosis = Diagnosis()
    add_tries(diagnosis, child("raise SystemExit('no driver')"))
    assert diagnosis.faults == ["starting: the process ended with exit code 1: no driver"]


def test_a_driver_that_hangs_is_ended():
    diagnosis = Diagnosis()
    begin = {"begin": "opening cuda:0", "device": "cuda:0"}
    add_tries(diagnosis, child("import time; time.sleep(60)", begin), timeout=1)
    assert diagnosis.faults == ["opening cuda:0: the process did not end in 1 s"]
    assert [device.name for device in diagnosis.devices] == ["cuda:0"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    writable = disk(tmp_path / "to" / "be" / "made", "cache")
    refused = disk(tmp_path / "file" / "hub", "cache")
    assert writable.writable == "ok"
    assert writable.free > 0
    assert refused.writable.startswith("NotADirectoryError: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_home_folder_is_not_named(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert without_home(f"{tmp_path}/cache") == "~/cache"
    assert described(OSError(f"no {tmp_path}/cache\nmore")) == "OSError: no ~/cache"


@pytest.fixture
def hub(tmp_path):
    """A Hub that knows one token; `ask(token, online)` is a client's report and its requests."""
    with HubServer() as server:

        def ask(token: str, *, online: bool) -> tuple[dict[str, object], list[tuple[str, str]]]:
            server.requests.clear()
            done = subprocess.run(
                [sys.executable, "-c", REPORT.format(online=online)],
                env=server.env(tmp_path, HF_TOKEN=token),
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            assert TOKEN not in done.stdout + done.stderr
            return json.loads(done.stdout), list(server.requests)

        yield server, ask


def test_nothing_is_sent_unless_online(hub):
    _, ask = hub
    report, requests = ask(TOKEN, online=False)
    assert (report["token"], report["answer"], requests) == ("the variable HF_TOKEN", None, [])


def test_the_hub_answers(hub, tmp_path):
    server, ask = hub
    accepted, requests = ask(TOKEN, online=True)
    assert accepted["answer"] == "reached, and the token is accepted"
    assert requests == [("GET", "/api/whoami-v2")]
    server.faults.append(Fault("GET /api/whoami-v2", 401, times=2))
    assert ask(TOKEN, online=True)[0]["answer"] == "the token is not accepted"
    without, _ = ask("", online=True)
    assert (without["token"], without["answer"]) == (None, "reached")
    (tmp_path / "token").write_text(TOKEN)  # HF_HOME is tmp_path
    assert ask("", online=False)[0]["token"] == str(tmp_path / "token")


def test_a_token_that_is_no_header_is_not_quoted(hub):
    _, ask = hub
    report, _ = ask(f"{TOKEN}\n{TOKEN}", online=True)
    assert report["answer"] == "LocalProtocolError"


@pytest.mark.parametrize(
    ("endpoint", "answer"),
    [("http://127.0.0.1:1", "ConnectError: "), ("nonsense", "UnsupportedProtocol: ")],
)
def test_a_hub_that_is_not_reached(endpoint, answer):
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(online=True)],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
    )
    assert TOKEN not in done.stdout + done.stderr
    assert json.loads(done.stdout)["answer"].startswith(answer)
