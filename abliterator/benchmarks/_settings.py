"""Settings of a run of tasks, the same for base and edited, and its engine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from abliterator.benchmarks._server import open_server, require_server
from abliterator.benchmarks._tasks import Task
from abliterator.errors import BenchmarkError
from abliterator.recipe import BenchmarkEngine, Benchmarks, Chat
from abliterator.record import Frozen, Side

# Types that lm-eval's transformers model computes on; for others it takes CUDA or the CPU.
_DEVICE_TYPES = ("cpu", "cuda", "hpu", "mps", "npu", "xpu")


class RunSettings(Frozen):
    """How every task is run.

    Attributes:
        section: the recipe's `benchmarks`: batch size, limit, chat template, examples and engine;
            its tasks and revisions are not read here. What the engine's options say of the chat
            template (`chat_template_args`, `enable_thinking`) goes before `chat`.
        chat: the recipe's `chat`; for tasks rendered by the chat template.
        device: as `load_model` takes it: "cpu", "cuda:0", "auto", "balanced".
        max_memory: bytes of weights on each accelerator and in host memory at most.
        dtype: dtype of the weights; None for the stored one.
        trust_remote_code: whether Python files of the checkpoint may run.
    """

    section: Benchmarks = Benchmarks(preset=None, limit=None)
    chat: Chat = Chat()
    device: str = "cpu"
    max_memory: int | None = None
    dtype: str | None = None
    trust_remote_code: bool = False

    def changed(self, **section: Any) -> RunSettings:
        """A copy with other values in the section."""
        return self.model_copy(update={"section": self.section.model_copy(update=section)})

    def of(self, task: Task) -> RunSettings:
        """The settings of a task, whose own limit, examples and chat template go before others."""
        fields = {"limit", "num_fewshot", "chat_template"}
        return self.changed(**task.model_dump(include=fields, exclude_none=True))

    def url(self, side: Side) -> str | None:
        """Address of the server that serves a side; None where no server is the engine."""
        engine = self.section.engine
        return engine.base_url if side == "base" else engine.edited_url

    def at(self, url: str | None) -> RunSettings:
        """The same settings with the address of a server; unchanged without one."""
        if url is None:
            return self
        addresses = {"base_url": url, "edited_url": url}
        engine = self.section.engine.model_copy(update=addresses)
        section = self.section.model_copy(update={"engine": engine})
        return self.model_copy(update={"section": section})

    def served(self, side: Side) -> str | None:
        """Name of a side's model on its server; None for the first that the server lists."""
        engine = self.section.engine
        return engine.base if side == "base" else engine.edited


def require_engine(
    engine: BenchmarkEngine,
    device: str = "cpu",
    *,
    sides: Collection[Side] = ("base", "edited"),
) -> None:
    """Checks that the engine can run here.

    Args:
        engine: what runs the benchmarks.
        device: where it is to compute, as torch names it; not read for a server or vLLM.
        sides: which are served already; not read for other engines.

    Raises:
        BenchmarkError: with what to install, to start or to choose.
    """
    if engine.kind == "transformers" and device.split(":")[0] not in _DEVICE_TYPES:
        raise BenchmarkError(
            f"lm-eval does not compute on {device}, only on devices of the types "
            f"{', '.join(_DEVICE_TYPES)}. Choose one of these (`--device cpu`), let a server "
            "compute (`benchmarks.engine`), or leave the benchmarks out "
            "(`--set benchmarks.preset=null --set benchmarks.tasks=[]`)."
        )
    if engine.kind == "vllm" and importlib.util.find_spec("vllm") is None:
        raise BenchmarkError(
            "`benchmarks.engine.kind` is vllm, but vLLM is not installed. Install it with `pip "
            "install 'lm-eval[vllm]'`, or set `kind: transformers`."
        )
    if engine.kind != "server":
        return
    if importlib.util.find_spec("tenacity") is None:
        raise BenchmarkError(
            "`benchmarks.engine.kind` is server, but lm-eval's client for servers is not "
            "installed. Install it with `pip install 'lm-eval[api]'`, or set `kind: transformers`."
        )
    key = os.environ.get(engine.api_key_env or "", "")
    servers = {"base": (engine.base_url, engine.base), "edited": (engine.edited_url, engine.edited)}
    for url, model in {servers[side] for side in sides}:
        require_server(url, model, key=key)


def open_model(folder: Path, settings: RunSettings, *, side: Side = "base") -> Any:
    """lm-eval's model of the checkpoint in `folder`, or of the server that serves this side."""
    engine = settings.section.engine
    common = {
        "batch_size": settings.section.batch_size,
        "trust_remote_code": settings.trust_remote_code,
        **engine.options,
    }
    if engine.kind == "server":
        url, model = settings.url(side), settings.served(side)
        return open_server(url, model, tokenizer=folder, options=common)
    common = {"dtype": settings.dtype or "auto", **common}
    if engine.kind == "vllm":
        from lm_eval.api.registry import get_model

        return get_model("vllm")(pretrained=str(folder), **common)
    from abliterator.benchmarks._transformers import open_transformers

    return open_transformers(
        folder, device=settings.device, max_memory=settings.max_memory, options=common
    )
