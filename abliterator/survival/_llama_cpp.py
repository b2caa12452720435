"""llama.cpp's own converter, quantiser and server: found, and run."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from abliterator.errors import QuantizationError
from abliterator.files import read_text
from abliterator.processes import child_environment, child_process, python_command, under_parent

CONVERTER, QUANTIZER, SERVER = "convert_hf_to_gguf.py", "llama-quantize", "llama-server"
_WHERE = ("", "build/bin", "build/bin/Release", "bin")  # in a folder of llama.cpp
_GGUF_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}  # by the dtype of safetensors
_START_SECONDS, _POLL_SECONDS = 600.0, 0.2
_LINES_SHOWN = 4
_VERSION = re.compile(r"version:\s*(\S+)")


class LlamaCpp(NamedTuple):
    """The programs of one installation, by their paths."""

    converter: Path
    quantizer: Path
    server: Path

    @property
    def version(self) -> str:
        """Its name with the version that the server states, if it does."""
        command, name = [str(self.server), "--version"], "llama.cpp"
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                command, capture_output=True, env=child_environment(), timeout=60, check=False
            )
            if stated := _VERSION.search((done.stdout + done.stderr).decode(errors="replace")):
                return f"{name} {stated[1]}"
        return name


def find_llama_cpp(folder: Path | None = None) -> LlamaCpp:
    """The programs of llama.cpp, in a folder or else on PATH.

    Args:
        folder: a clone of llama.cpp that was built, or a folder with the programs.

    Raises:
        QuantizationError: for each that is not there.
    """
    names = (CONVERTER, QUANTIZER, SERVER)
    found = [_program(name, folder) for name in names]
    if missing := [name for name, path in zip(names, found, strict=True) if path is None]:
        where = f"in {folder}" if folder is not None else "on PATH"
        raise QuantizationError(
            f"GGUF formats are made by llama.cpp, of which {', '.join(missing)} is not {where}. "
            f"Install llama.cpp (its releases, or `brew install llama.cpp`) so that {CONVERTER}, "
            f"{QUANTIZER} and {SERVER} are on PATH, or give the folder of a clone that was built: "
            "`--llama-cpp FOLDER`."
        )
    return LlamaCpp(*(path for path in found if path is not None))


def _program(name: str, folder: Path | None) -> Path | None:
    if folder is None:
        path = shutil.which(name) or shutil.which(name.removesuffix(".py"))
        return Path(path) if path else None
    ending = ".exe" if os.name == "nt" and not name.endswith(".py") else ""
    places = (folder / part / f"{name}{ending}" for part in _WHERE)
    return next((place.resolve() for place in places if place.is_file()), None)


def gguf_type(dtype: str) -> str:
    """The type to which weights of a safetensors dtype are converted without loss."""
    return _GGUF_TYPES.get(dtype, "f32")


def convert(tools: LlamaCpp, folder: Path, gguf: Path, *, kind: str, log: Path) -> None:
    """Converts a checkpoint to GGUF, without quantising it.

    Raises:
        QuantizationError: with the converter's last lines, as for a model that it does not know.
    """
    command = [str(tools.converter), str(folder), "--outtype", kind, "--outfile", str(gguf)]
    changes = {}
    if tools.converter.suffix == ".py":  # its modules lie beside it
        command = python_command(*command)
        paths = (str(tools.converter.resolve().parent), os.environ.get("PYTHONPATH"))
        changes["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    remedy = (
        "Install the Python packages that it misses, use a newer llama.cpp, or leave GGUF formats "
        "out of `--as`."
    )
    _run(command, changes, log, f"{CONVERTER} refuses {folder}", remedy)


def quantize(tools: LlamaCpp, gguf: Path, quantized: Path, *, kind: str, log: Path) -> None:
    """Quantises a GGUF file.

    Raises:
        QuantizationError: with the quantiser's last lines.
    """
    command = [str(tools.quantizer), str(gguf), str(quantized), kind]
    problem = f"{QUANTIZER} cannot make {kind} of {gguf.name}"
    _run(command, {}, log, problem, "Use a newer llama.cpp, or leave the format out of `--as`.")


def commands(name: str, kind: str) -> tuple[str, ...]:
    """The same by hand, for the folder of one side."""
    return (
        f"{CONVERTER} FOLDER --outtype {kind} --outfile model.gguf",
        f"{QUANTIZER} model.gguf model-{name}.gguf {name}",
        f"{SERVER} -m model-{name}.gguf",
    )


def _run(
    command: Sequence[str], changes: dict[str, str], log: Path, problem: str, remedy: str
) -> None:
    start = log.stat().st_size if log.exists() else 0
    with (
        log.open("a", encoding="utf-8") as errors,
        child_process(
            under_parent(command), env=child_environment(changes), stderr=errors
        ) as child,
    ):
        child.wait()
    if child.returncode:
        raise QuantizationError(
            f"{problem} (status {child.returncode}). Its last lines: {_last_lines(log, start)} "
            f"{remedy}"
        )


def _last_lines(log: Path, start: int) -> str:
    lines = [line.strip() for line in read_text(log)[start:].splitlines() if line.strip()]
    return " / ".join(lines[-_LINES_SHOWN:]) or "none"


@contextmanager
def llama_server(
    tools: LlamaCpp, gguf: Path, *, name: str, context: int, slots: int, log: Path
) -> Iterator[str]:
    """The address, with /v1, of a server of a GGUF file, as long as the context is open.

    It listens at a free port of this machine, and ends when this process does.

    Args:
        tools: llama.cpp.
        gguf: the model.
        name: under which it is served.
        context: tokens of a prompt and its answer, at most.
        slots: prompts that are answered at a time.
        log: file to which the server's own log is appended.

    Raises:
        QuantizationError: if it ends, or is not ready in time.
    """
    port = _free_port()
    command = [str(tools.server), "-m", str(gguf), "--alias", name]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["-c", str(context * slots), "-np", str(slots)]
    start = log.stat().st_size if log.exists() else 0
    with (
        log.open("a", encoding="utf-8") as errors,
        child_process(under_parent(command), env=child_environment(), stderr=errors) as child,
    ):
        address = f"http://127.0.0.1:{port}"
        begin = time.monotonic()
        while not _is_healthy(address):
            if child.poll() is not None or time.monotonic() - begin > _START_SECONDS:
                raise QuantizationError(
                    f"{SERVER} does not serve {gguf.name} (status {child.returncode}). Its last "
                    f"lines: {_last_lines(log, start)} Use a newer llama.cpp, or leave the format "
                    "out of `--as`."
                )
            time.sleep(_POLL_SECONDS)
        try:
            yield f"{address}/v1"
        finally:
            if child.stdin is not None:
                child.stdin.close()  # which asks it to end


def _is_healthy(address: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{address}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
