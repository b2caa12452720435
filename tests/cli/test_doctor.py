"""`abliterator doctor` ends with a report, whatever the machine is like."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from abliterator.cli._doctor import diagnosis_text
from abliterator.diagnostics import Device, Diagnosis, Hub

TOKEN = "hf_" + "s" * 34


def doctor(*arguments: str, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "abliterator", "doctor", *arguments],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def test_a_report_of_this_machine(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    lines = doctor(cwd=tmp_path, HF_HOME=str(tmp_path / "home")).splitlines()
    assert 10 <= len(lines) <= 20
    labels = [line.split()[0] for line in lines]
    assert labels[:6] == ["abliterator", "python", "torch", "packages", "imports", "host"]
    assert f"transformers {version('transformers')}" in lines[3]
    assert lines[4].split(maxsplit=1)[1] == "torch, transformers, datasets, lm_eval ok"
    cpu = next(line for line in lines if line.startswith("device       cpu:"))
    assert cpu.endswith("float32, bfloat16, float16, float64 ok")
    (hub,) = [line for line in lines if line.startswith("hub")]
    assert str(tmp_path / "home" / "token") in hub
    assert "offline (HF_HUB_OFFLINE)" in hub
    assert "fault" not in labels


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps the folder of a process")
def test_a_machine_on_which_nothing_works(tmp_path):
    """No cache, no working folder, and packages that cannot be imported."""
    broken = tmp_path / "packages"
    broken.mkdir()
    for package in ("torch", "transformers", "datasets", "lm_eval", "psutil"):
        (broken / f"{package}.py").write_text("raise OSError(f'{__name__}.so: cannot be opened')")
    (tmp_path / "file").touch()
    folder = tmp_path / "deleted"
    folder.mkdir()
    shell = f'rmdir "{folder}"; exec "{sys.executable}" -m abliterator doctor --json'
    done = subprocess.run(
        ["sh", "-c", shell],
        cwd=folder,
        env={
            **os.environ,
            "HF_HOME": str(tmp_path / "file" / "home"),
            "PYTHONPATH": os.pathsep.join([str(broken), str(Path(__file__).parents[2])]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    assert report["imports"]["torch"] == "OSError: torch.so: cannot be opened"
    assert report["host"] is None
    assert [disk["writable"] for disk in report["disks"]][-1].startswith("NotADirectoryError")
    assert [fault.split(":")[0] for fault in report["faults"]] == [
        "host",
        "devices",
        "working folder",
    ]
    assert report["versions"]["abliterator"] == version("abliterator")


def test_what_failed_stands_beside_what_did_not():
    refusal = "TypeError: no float64 on MPS"
    device = Device("mps", "Apple M2", 4 * 10**9, 16 * 10**9, {"float32": "ok", "float64": refusal})
    hub = Hub("https://huggingface.co", "the variable HF_TOKEN", offline=False, answer=None)
    text = diagnosis_text(Diagnosis(devices=[device], hub=hub, faults=["mps: ended"]))
    assert (
        "device       mps: Apple M2, 4.000 GB of 16.000 GB free, matrix products float32 ok; "
        "float64: TypeError: no float64 on MPS\n" in text
    )
    assert "token in the variable HF_TOKEN (not shown)" in text
    assert text.endswith("fault        mps: ended")
