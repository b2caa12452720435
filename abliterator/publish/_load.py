"""The last check before anything is sent: does plain transformers load what will be there?

Of an adapter: does plain PEFT load it, on top of the base?
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from abliterator.errors import PublishError
from abliterator.processes import child_environment, python_command
from abliterator.publish._plan import PublishPlan

_TOLD = 300  # characters of what the other process said


def check_loads(plan: PublishPlan) -> None:
    """Loads exactly the planned files in a fresh process, offline and without a token.

    Raises:
        PublishError: if they do not load, or the model does not run.
    """
    with tempfile.TemporaryDirectory(prefix="abliterator-load-") as folder:
        for file in plan.files:
            place = Path(folder) / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file.content, bytes):
                place.write_bytes(file.content)
            else:
                place.symlink_to(file.content.resolve())
        if plan.what == "adapter":
            found = _run([str(plan.folders.base), "--adapter", folder], plan.remote_code)
        else:
            found = _run([folder], plan.remote_code)
        problem = _problem(found, plan.what)
    if problem:
        # the folder that was loaded is gone when this is read
        problem = problem.replace(folder, f"the planned {plan.what}")
        loader = "PEFT" if plan.what == "adapter" else "transformers"
        raise PublishError(
            f"Plain {loader}, offline in a fresh process, {problem}. Nothing was published. "
            f"Look at the {plan.what} with `abliterator verify`, and at the versions in its card."
        )


def _run(arguments: list[str], remote_code: bool) -> dict[str, Any]:
    script = Path(__file__).with_name("_vanilla.py")
    env = child_environment(
        {
            "CUDA_VISIBLE_DEVICES": "",  # seeing a GPU, transformers leaves FP8 packed, on CPUs too
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "0",
            "TRANSFORMERS_OFFLINE": "1",
        }
    )
    done = subprocess.run(
        python_command(str(script), *arguments, *["--remote-code"] * remote_code),
        env=env,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        return {"error": last[:_TOLD]}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _problem(found: dict[str, Any], what: str) -> str | None:
    if "error" in found:
        return f"cannot load the {what}: {found['error']}"
    for key in ("missing", "mismatched"):
        if found[key]:
            return f"finds {len(found[key])} tensors {key}, such as {found[key][0]}"
    return None if found["finite"] else "gets values that are not numbers out of the model"
