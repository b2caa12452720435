"""The load check: plain transformers loads a planned checkpoint, plain PEFT an adapter.

A checkpoint in a format that transformers has no code for (ModelOpt's NVFP4) is loaded as
abliterator itself runs it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from abliterator.errors import AbliteratorError, PublishError
from abliterator.files import link_file, read_text
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
        elif _is_unknown_to_transformers(Path(folder)):
            report = _loaded_here(Path(folder))
        else:
            report = _run([folder], plan.remote_code)
        problem = _problem(report, plan.what)
    if problem:
        # the folder that was loaded is deleted by now
        problem = problem.replace(folder, f"the planned {plan.what}")
        loader = "PEFT" if plan.what == "adapter" else "transformers"
        how = f"Plain {loader}, offline in a fresh process,"
        raise PublishError(
            f"{report.get('loader', how)} {problem}. Nothing was published. "
            f"Look at the {plan.what} with `abliterator verify`, and at the versions in its card."
        )


def _is_unknown_to_transformers(folder: Path) -> bool:
    """Whether the weights are quantised by a method that transformers does not know."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    settings = json.loads(read_text(folder / "config.json")).get("quantization_config")
    if not isinstance(settings, dict) or "quant_method" not in settings:
        return False
    return settings["quant_method"] not in {"bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING}


def _loaded_here(folder: Path) -> dict[str, Any]:
    """The report of a load by abliterator, which decodes the weights and runs a first pass."""
    from abliterator.model import load_model

    report: dict[str, Any] = {"loader": "abliterator, which alone decodes them here,"}
    try:
        load_model(folder, device="cpu", dtype=None)
    except AbliteratorError as error:
        return {**report, "error": str(error)}
    return {**report, "missing": [], "mismatched": [], "finite": True}


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
