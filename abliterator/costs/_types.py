"""What stages are asked for, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict


class StageCost(BaseModel):
    """The cost of one stage.

    Attributes:
        stage: its name; "prompts" with what happens before it.
        seconds: of this machine, about.
        host_memory: bytes of the largest process at most, at its peak.
        device_memory: bytes on the accelerator at the peak; 0 where the CPU computes.
        read_tokens: tokens of prompts that pass the model, about.
        answer_tokens: tokens that are generated at most.
        disk: bytes that are written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    seconds: float
    host_memory: int = 0
    device_memory: int = 0
    read_tokens: int = 0
    answer_tokens: int = 0
    disk: int = 0


class Answers(NamedTuple):
    """Prompts that are answered together.

    Attributes:
        lengths: tokens of each, with the chat template.
        tokens: of an answer, at most.
        batch_size: prompts at a time.
        shared: tokens with which all begin, where they run once.
    """

    lengths: Sequence[int]
    tokens: int
    batch_size: int
    shared: int = 0


class Benchmark(NamedTuple):
    """A benchmark task.

    Attributes:
        documents: that are scored.
        requests: sequences that a document takes.
        tokens: of a sequence.
        generated: tokens of an answer; 0 where likelihoods are compared.
    """

    documents: int
    requests: int
    tokens: int
    generated: int = 0


Answerer = Literal["process", "engine", "server"]
"""What answers: this process, an engine that the build starts here, or a server elsewhere."""


class Setup(NamedTuple):
    """How a build uses the machine.

    Attributes:
        on_disk: bytes of weights, in the dtype of computation, that lie on disk while it answers.
        streams: whether passes over many prompts read the weights block by block, once for all.
        devices: over which the weights are spread, where they lie on several accelerators.
        speedup: by which workers are faster together than this process alone.
        bake_workers: tensors that are edited at once.
        answers: what gives those of base and edited.
        candidates: what gives those of a sweep.
        benchmarks: what scores them.
        engine_devices: on which an engine computes together.
        engine_batch: prompts in flight.
    """

    on_disk: int = 0
    streams: bool = False
    devices: int = 1
    speedup: float = 1.0
    bake_workers: int = 1
    answers: Answerer = "process"
    candidates: Answerer = "process"
    benchmarks: Answerer = "process"
    engine_devices: int = 1
    engine_batch: int = 32


class Batch(NamedTuple):
    """The largest batch of a stage.

    Attributes:
        rows: sequences.
        tokens: of each, answers included.
        logits: positions in all rows together that get logits.
    """

    rows: int = 0
    tokens: int = 0
    logits: int = 0
