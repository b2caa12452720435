"""Settings of what answers prompts: transformers in this process, vLLM, or a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from abliterator.recipe._benchmarks import BenchmarkEngine
from abliterator.recipe._section import Positive, Section, as_tuple
from abliterator.recipe._server import (
    PlainSettings,
    PlainUrl,
    ServerSettings,
    name_of_variable,
)

EngineKind = Literal["transformers", "vllm", "server"]
Name = Annotated[str, Field(min_length=1)]

STARTED_KEY = "ABLITERATOR_ENGINE_KEY"
"""Environment variable of this process that holds the key of the servers that it started."""
_STARTED = "http://127.0.0.1/v1"  # their address; the port is known when they run

_SERVER = {"base_url", "edited_url", "base", "edited", "api_key_env"}
_VLLM = {
    *("python", "tensor_parallel", "pipeline_parallel", "dtype", "max_model_len", "memory"),
    *("start_timeout", "arguments"),
}
_BOTH = {"concurrency", "timeout", "time_limit", "parameters", "benchmarks"}
_KINDS: dict[EngineKind, set[str]] = {
    "transformers": set(),
    "server": _SERVER | _BOTH,
    "vllm": _VLLM | _BOTH,
}
_HOW = {
    *("api_key_env", "concurrency", "timeout", "time_limit", "start_timeout", "python", "memory"),
    "benchmarks",
}
# Of a request: set from the recipe's other keys, so that both sides are asked alike.
_RESERVED = {
    *("model", "prompt", "max_tokens", "n_predict", "temperature", "stop", "stop_token_ids"),
    *("stream", "n", "echo", "logprobs", "return_token_ids", "return_tokens"),
}


class EngineServer(ServerSettings):
    """Address of a server that answers prompts of one side, and how requests are made."""

    section: ClassVar[str] = "engine"

    side: Literal["base", "edited"] = "base"
    """The side that it answers for."""

    @property
    def url_key(self) -> str:
        """Dotted key of the recipe that holds the address."""
        return "engine.base_url" if self.side == "base" else "engine.edited_url"

    @property
    def model_key(self) -> str:
        """Dotted key of the recipe that holds the model's name."""
        return f"engine.{self.side}"


class EngineSettings(Section):
    """What answers prompts and scores benchmarks; other passes run in this process."""

    kind: EngineKind = "transformers"
    """`transformers`: this process. `vllm`: vLLM, which the run starts and ends.

    `server`: a running server with OpenAI's protocol (vLLM, SGLang, llama.cpp, TGI) that serves
    base and edited model.
    """

    base_url: PlainUrl | None = None
    """`server`: its address, with `/v1` if it needs that."""
    edited_url: PlainUrl | None = None
    """`server`: address that serves the edited model. Default: `base_url`."""
    base: Name | None = None
    """`server`: name under which the base is served. Default: the recipe's `model`."""
    edited: Name = "edited"
    """`server`: name under which the edited model is served."""
    api_key_env: str | None = None
    """`server`: name of the environment variable that holds the key, if it wants one."""

    python: Name | None = None
    """`vllm`: interpreter that has vLLM, relative to the recipe. Default: this one."""
    tensor_parallel: Positive = 1
    """`vllm`: devices among which each layer is divided."""
    pipeline_parallel: Positive = 1
    """`vllm`: groups of devices among which the layers are divided."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`vllm`: dtype of computation; `auto` is that of the run (`--dtype`)."""
    max_model_len: Positive | None = None
    """`vllm`: tokens of a prompt and its answer. Default: the model's context."""
    memory: Annotated[float, Field(gt=0, le=1)] | None = None
    """`vllm`: share of each device's memory that it may fill.

    Default: vLLM's; 0.45 in a sweep, where this process computes on the device too; on a CPU, at
    most 4 GB for keys and values.
    """
    start_timeout: Annotated[float, Field(gt=0)] = 1800.0
    """`vllm`: seconds until it serves, at most."""
    arguments: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """`vllm`: further arguments of its command line."""

    concurrency: Annotated[int, Field(ge=1, le=256)] = 32
    """Prompts in flight."""
    timeout: Annotated[float, Field(gt=0, le=3600)] = 600.0
    """Seconds for one answer."""
    time_limit: Annotated[float, Field(gt=0)] = 86400.0
    """Seconds for the answers of one run, waiting included."""
    parameters: PlainSettings = {}
    """Further request parameters of the server; decoding is greedy whatever they say."""

    benchmarks: bool = True
    """Benchmarks run on it too; false leaves them to `benchmarks.engine`."""

    @field_validator("api_key_env")
    @classmethod
    def _name_of_a_variable(cls, value: str | None) -> str | None:
        return name_of_variable(value)

    @model_validator(mode="after")
    def _only_what_applies(self) -> Self:
        fields = type(self).model_fields
        for name in sorted(self.model_fields_set - {"kind"} - _KINDS[self.kind]):
            if getattr(self, name) != fields[name].default:
                kinds = [f"`kind: {kind}`" for kind, names in _KINDS.items() if name in names]
                raise ValueError(f"`{name}` belongs to {' or '.join(kinds)}")
        if self.kind == "server" and self.base_url is None:
            raise ValueError("`kind: server` needs `base_url`, the address of the server")
        reserved = sorted(_RESERVED & set(self.parameters))
        if reserved:
            raise ValueError(f"`parameters` cannot hold `{reserved[0]}`")
        return self

    @model_serializer(mode="wrap")
    def _dump_applicable(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in plain(self).items() if k == "kind" or k in _KINDS[self.kind]}

    def server(
        self, side: Literal["base", "edited"], *, model: str, base_url: str | None = None
    ) -> EngineServer:
        """The server of a side.

        Args:
            side: base or edited model.
            model: name of the base where the section gives none.
            base_url: address instead of the section's, where the run started the server.
        """
        own_url = self.edited_url if side == "edited" else None
        started = _STARTED if self.kind == "vllm" else ""
        return EngineServer(
            base_url=base_url or own_url or self.base_url or started,
            model=self.edited if side == "edited" else self.base or model,
            side=side,
            api_key_env=STARTED_KEY if self.kind == "vllm" else self.api_key_env,
            structured="none",
            parameters=self.parameters,
            concurrency=self.concurrency,
            timeout=self.timeout,
            time_limit=self.time_limit,
        )

    def benchmark_engine(self, model: str) -> BenchmarkEngine | None:
        """What runs benchmarks, if the server does; `model` names the base where nothing does."""
        if self.kind == "transformers" or not self.benchmarks:
            return None
        model = "base" if self.kind == "vllm" else model
        base, edited = self.server("base", model=model), self.server("edited", model=model)
        return BenchmarkEngine(
            kind="server",
            base_url=base.base_url,
            edited_url=edited.base_url,
            base=base.model,
            edited=edited.model,
            api_key_env=base.api_key_env,
        )

    def published(self) -> dict[str, Any]:
        """The section as plain values, without the folder of the interpreter."""
        values = self.model_dump(mode="json")
        if self.python is not None and "python" in values:
            values["python"] = Path(self.python).name
        return values

    def affecting_answers(self) -> dict[str, Any]:
        """What answers depend on: all but how the engine is reached, started and awaited."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in _HOW}
