"""The command line and the environment of a vLLM server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from abliterator.devices import CPU, device_memory
from abliterator.diagnostics import VllmInstall
from abliterator.errors import RecipeError
from abliterator.processes import child_environment
from abliterator.recipe import EngineSettings

MAX_LORAS = 8  # adapters in one batch: each takes a slot on the device
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
_BESIDE = 0.45  # share of a device's memory where this process computes beside it
_CACHE_BYTES = 4 << 30  # for keys and values in host memory, at most
# Set by the run itself: what is served, where, to whom, and how.
_OURS = {
    *("--model", "--served-model-name", "--host", "--port", "--api-key", "--uds", "--root-path"),
    *("--dtype", "--tensor-parallel-size", "--pipeline-parallel-size", "--trust-remote-code"),
    *("--generation-config", "--max-model-len", "--gpu-memory-utilization", "--enable-lora"),
    *("--max-lora-rank", "--max-loras", "--lora-target-modules", "--lora-modules"),
}


class AdapterSlots(NamedTuple):
    """The adapters that a server can load.

    Attributes:
        rank: the largest, one of `RANKS`.
        modules: last parts of the paths of the modules that they change.
    """

    rank: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Served:
    """A checkpoint, and how it is computed.

    Attributes:
        folder: the checkpoint.
        name: under which it is served.
        dtype: of computation; None is the stored one.
        trust_remote_code: run the model's own code.
        slots: for adapters; None serves the checkpoint alone.
        is_beside: whether this process computes on the same devices meanwhile.
    """

    folder: Path
    name: str
    dtype: str | None = None
    trust_remote_code: bool = False
    slots: AdapterSlots | None = None
    is_beside: bool = False


def slot_rank(rank: int) -> int | None:
    """The smallest rank of a slot into which an adapter fits, at least 8; None if none does."""
    # of rank 1 there is a slot too, but a sweep goes on to stacks of several directions
    return next((allowed for allowed in RANKS[1:] if allowed >= rank), None)


def dtype_of(served: Served, settings: EngineSettings) -> str | None:
    """The dtype of computation; None is the stored one."""
    return settings.dtype if settings.dtype != "auto" else served.dtype


def server_command(
    install: VllmInstall, served: Served, settings: EngineSettings, port: int
) -> list[str]:
    """The command of a server that listens at a port of this machine alone.

    Raises:
        RecipeError: where `engine.arguments` would set what the run itself sets.
    """
    _require_others(settings.arguments)
    options = {
        "--model": str(served.folder),
        "--served-model-name": served.name,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": dtype_of(served, settings) or "auto",
        "--tensor-parallel-size": str(settings.tensor_parallel),
        "--pipeline-parallel-size": str(settings.pipeline_parallel),
        # no sampling, penalties or lengths of generation_config.json: both sides decode alike
        "--generation-config": "vllm",
        "--max-model-len": str(settings.max_model_len or "auto"),
        "--uvicorn-log-level": "warning",
    }
    if settings.memory is not None:
        options["--gpu-memory-utilization"] = str(settings.memory)
    elif (served.is_beside or served.slots is not None) and not install.on_cpu:
        options["--gpu-memory-utilization"] = str(_BESIDE)
    flags = ["--trust-remote-code"] if served.trust_remote_code else []
    if install.on_cpu:
        flags.append("--enforce-eager")  # compiling takes longer than it saves
    if served.slots is not None:
        flags.append("--enable-lora")
        options["--max-lora-rank"] = str(served.slots.rank)
        options["--max-loras"] = str(MAX_LORAS)
    command = [install.python, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    command += [part for option in options.items() for part in option] + flags
    if served.slots is not None:
        command += ["--lora-target-modules", *served.slots.modules]
    return [*command, *settings.arguments]


def server_environment(
    install: VllmInstall, settings: EngineSettings, *, key: str
) -> dict[str, str]:
    """The environment of the server, which asks nothing of any network.

    Args:
        install: the interpreter.
        settings: of the engine.
        key: that a client must show: other users of this machine reach the port too.
    """
    changes = {
        "VLLM_API_KEY": key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(round(settings.start_timeout)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if install.on_cpu:
        # threads bound to cores, as is its default, fail in containers and share cores with others
        on_cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if settings.memory is None:
            free = device_memory(CPU).free
            on_cpu["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, min(_CACHE_BYTES, free // 4) >> 30))
        changes |= {name: os.environ.get(name, value) for name, value in on_cpu.items()}
    return child_environment(changes)


def _require_others(arguments: Sequence[str]) -> None:
    names = {argument.split("=", 1)[0].replace("_", "-") for argument in arguments}
    if taken := sorted(names & _OURS):
        raise RecipeError(
            f"`engine.arguments` cannot hold {', '.join(taken)}: the run itself sets it. Other "
            "keys of `engine`, and `--dtype`, say how vLLM runs."
        )
