"""An interpreter that has "vLLM": this one, with a small server of the same command line."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

MODULES = Path(__file__).parent / "vllm_stand_in"
VERSION = "0.0.1"


def vllm_interpreter(folder: Path, *, distribution: str | None = "vllm") -> str:
    """The path of such an interpreter, made in `folder`; without a distribution it has none."""
    site = folder / "site"
    if distribution is not None:
        info = site / f"{distribution.replace('-', '_')}-{VERSION}.dist-info"
        info.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {VERSION}\n"
        (info / "METADATA").write_text(metadata)
    folder.mkdir(exist_ok=True)
    python = folder / "python"
    path = shlex.quote(f"{MODULES}:{site}")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return str(python)
