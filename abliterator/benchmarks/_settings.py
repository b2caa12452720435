"""How tasks are run, the same for base and edited, and by which engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from abliterator.benchmarks._server import open_server, require_server
from abliterator.errors import BenchmarkError

EngineKind = Literal["transformers", "vllm", "server"]


@dataclass(frozen=True)
class Engine:
    """What runs the model: lm-eval's own backends, with their own options.

    Attributes:
        kind: "transformers" in this process; "vllm"; "server", any OpenAI-compatible completions
            server that gives log-probabilities of the prompt (`echo`), such as `vllm serve`.
        url: of the server, up to and with /v1.
        options: further arguments of lm-eval's backend, such as `tensor_parallel_size`.
    """

    kind: EngineKind = "transformers"
    url: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSettings:
    """How every task is run.

    Attributes:
        batch_size: requests a forward pass; the same for base and edited.
        limit: the first so many documents of each task; None for all.
        chat_template: whether prompts are wrapped in the checkpoint's chat template.
        system: system prompt of these chats; None for none.
        template_kwargs: further variables of the chat template; what the engine's options say of
            it (`chat_template_args`, `enable_thinking`) goes before them.
        num_fewshot: worked examples before each question; None for the task's own number, which a
            task that says 0 keeps in any case.
        device: for example "cpu" or "cuda:0".
        dtype: dtype of the weights; None for the stored one.
        trust_remote_code: whether Python files of the checkpoint may run.
        engine: what runs the model.
    """

    batch_size: int = 8
    limit: int | None = None
    chat_template: bool = False
    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    num_fewshot: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    trust_remote_code: bool = False
    engine: Engine = Engine()


def require_engine(engine: Engine) -> None:
    """Raises BenchmarkError, with what to install or start, if the engine is not there."""
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
    require_server(engine.url)


def open_model(folder: Path, settings: RunSettings) -> Any:
    """lm-eval's model of the checkpoint in `folder`."""
    engine = settings.engine
    common = {
        "batch_size": settings.batch_size,
        "trust_remote_code": settings.trust_remote_code,
        **engine.options,
    }
    if engine.kind == "server":
        return open_server(engine.url, tokenizer=folder, options=common)
    common = {"dtype": settings.dtype or "auto", **common}
    if engine.kind == "vllm":
        from lm_eval.api.registry import get_model

        return get_model("vllm")(pretrained=str(folder), **common)
    from abliterator.benchmarks._transformers import open_transformers

    return open_transformers(folder, device=settings.device, options=common)
