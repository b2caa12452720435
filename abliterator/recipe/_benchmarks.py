"""What the edit cost: divergence and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from abliterator.recipe._section import Positive, Section, as_tuple
from abliterator.recipe._server import PlainSettings, PlainUrl


class DivergenceSettings(Section):
    """How far the edited distribution moved on neutral prompts."""

    limit: Positive = 128
    """Neutral prompts compared."""
    tokens: Positive = 32
    """Answer tokens compared of each prompt, along the base's greedy answer."""


Preset = Literal["demo", "quick", "seed", "damage"]


class BenchmarkTask(Section):
    """A task with settings of its own, which go before those of the section."""

    task: str
    """Name that lm-eval has, or YAML file, relative to the recipe."""
    limit: Positive | None = None
    """Documents of this task."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question."""
    chat_template: bool | None = None
    """Ask through the chat template."""


# Which model is measured, where, and whether its own code may run, is not the backend's to say.
_SAID_ELSEWHERE = {
    *("delta", "gguf_file", "lora_local_path", "peft", "pretrained", "subfolder"),
    *("device", "softmax_dtype", "trust_remote_code"),
}


class BenchmarkEngine(Section):
    """What runs the models: a backend of lm-eval's."""

    kind: Literal["transformers", "vllm", "server"] = "transformers"
    """`vllm` needs vLLM installed; `server` two completions servers that give log-probabilities."""
    base_url: PlainUrl | None = None
    """Server of the base, up to and with /v1."""
    edited_url: PlainUrl | None = None
    """Server of the edited model."""
    options: PlainSettings = {}
    """Further arguments of lm-eval's backend, such as `tensor_parallel_size`.

    Those that would name another model, its device or trust are refused.
    """

    @model_validator(mode="after")
    def _options_of_the_backend_alone(self) -> Self:
        taken = sorted(_SAID_ELSEWHERE & self.options.keys())
        if taken:
            raise ValueError(f"`options` cannot set {', '.join(taken)}: the run itself does")
        return self

    @model_validator(mode="after")
    def _urls_of_servers(self) -> Self:
        given = [self.base_url is not None, self.edited_url is not None]
        if given != [self.kind == "server"] * 2:
            raise ValueError("`base_url` and `edited_url` belong to `kind: server`, both of them")
        return self


Tasks = Annotated[tuple[str | BenchmarkTask, ...], BeforeValidator(as_tuple)]


class Benchmarks(Section):
    """What lm-eval measures, base and edited on the same documents.

    A recipe without the section measures nothing; a section that names no tasks, the five of the
    replication (`preset: seed`), which need the Hub.
    """

    preset: Preset | None = None
    """A named list of tasks, before those of `tasks`; `demo` needs no Hub."""
    tasks: Tasks = ()
    """Tasks, groups and tags that lm-eval has, by name, or YAML files, relative to the recipe."""
    limit: Positive | None = 500
    """Documents of each task; null for all."""
    batch_size: Positive = 8
    """Documents scored together, the same for base and edited."""
    chat_template: bool = False
    """Ask through the chat template."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; null for the task's own number."""
    engine: BenchmarkEngine = BenchmarkEngine()
    """What runs the models."""
    revisions: dict[str, str] = {}
    """Commits of the tasks' Hub datasets; left out, the build resolves them and writes them."""

    @model_validator(mode="before")
    @classmethod
    def _the_replications_tasks(cls, values: Any) -> Any:
        if isinstance(values, dict) and not {"preset", "tasks"} & set(values):
            return {**values, "preset": "seed"}
        return values


def without_folder(task: str | dict[str, Any]) -> str | dict[str, Any]:
    """A benchmark task whose YAML file, if it is one, is only its last name."""
    if isinstance(task, dict):
        return {**task, "task": without_folder(task["task"])}
    return Path(task).name if is_task_file(task) else task


def is_task_file(task: str) -> bool:
    """Whether a benchmark task is a YAML file rather than a name that lm-eval has."""
    return Path(task).suffix in {".yaml", ".yml"}
