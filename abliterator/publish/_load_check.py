"""The load check: plain transformers loads a planned checkpoint, plain PEFT an adapter."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from abliterator.errors import PublishError
from abliterator.files import link_file
from abliterator.processes import child_environment, child_process, python_command
from abliterator.publish._plan import PublishPlan

_ERROR_CHARACTERS = 300  # of the other process, that a message shows


def check_loads(plan: PublishPlan) -> None:
    """Loads exactly the planned files in a fresh process, offline and without a token.

    Raises:
        PublishError: if they do not load, or the model does not run.
    """
    with tempfile.TemporaryDirectory(prefix="abliterator-load-") as folder:
        for file in plan.files:
            target = Path(folder) / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file.content, bytes):
                target.write_bytes(file.content)
            else:
                link_file(file.content, target)
        if plan.what == "adapter":
            report = _run([str(plan.folders.base), "--adapter", folder], plan.remote_code)
        else:
            report = _run([folder], plan.remote_code)
        problem = _problem(report, plan.what)
    if problem:
        # the folder that was loaded is deleted by now
        problem = problem.replace(folder, f"the planned {plan.what}")
        loader = "PEFT" if plan.what == "adapter" else "transformers"
        raise PublishError(
            f"Plain {loader}, offline in a fresh process, {problem}. Nothing was published. "
            f"Look at the {plan.what} with `abliterator verify`, and at the versions in its card."
        )


def _run(arguments: list[str], remote_code: bool) -> dict[str, Any]:
    script = Path(__file__).with_name("_load_check_child.py")
    env = child_environment(
        {
            "CUDA_VISIBLE_DEVICES": "",  # seeing a GPU, transformers leaves FP8 packed, on CPUs too
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "0",
            "TRANSFORMERS_OFFLINE": "1",
        }
    )
    command = python_command(str(script), *arguments, *["--remote-code"] * remote_code)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        with child_process(command, env=env, stderr=stderr) as child:
            output = child.stdout.read() if child.stdout else ""
        stderr.seek(0)
        last_line = (stderr.read().strip() or "no error was printed").splitlines()[-1]
    if child.returncode:
        return {"error": last_line[:_ERROR_CHARACTERS]}
    report: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return report


def _problem(report: dict[str, Any], what: str) -> str | None:
    if "error" in report:
        return f"cannot load the {what}: {report['error']}"
    for key in ("missing", "mismatched"):
        if report[key]:
            return f"finds {len(report[key])} tensors {key}, such as {report[key][0]}"
    return None if report["finite"] else "gets values that are not numbers out of the model"
