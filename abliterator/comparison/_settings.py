"""What a comparison measures, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.benchmarks import RunSettings, Task
from abliterator.diagnostics import VllmInstall
from abliterator.prompts import Prompt
from abliterator.recipe import EngineSettings
from abliterator.record import Side

if TYPE_CHECKING:
    from abliterator.workers import Pool

SIDES: tuple[Side, Side] = ("base", "edited")


@dataclass(frozen=True)
class CompareSettings:
    """Prompt sets, tasks and settings of a comparison.

    Attributes:
        prompts: sets that both sides answer, by name ("target", "neutral"); divergence is measured
            on "neutral".
        tasks: benchmarks, from `resolve_tasks`.
        max_new_tokens: tokens of an answer.
        kl_tokens: answer tokens compared of each neutral prompt, at most.
        batch_size: prompts answered together; None for the engine's choice.
        max_batch_tokens: tokens in one forward pass of the divergence.
        seed: of the intervals.
        benchmarks: how benchmarks are run; device and dtype are those of all measurements.
        engine: what answers: this process, or a server that serves both sides.
        answers: file that caches the answers of a server; left out, they are kept nowhere.
        vllm: what runs vLLM, where that is the engine.
        pool: workers that hold the models, instead of this process; closed before benchmarks.
    """

    prompts: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)
    tasks: Sequence[Task] = ()
    max_new_tokens: int = 256
    kl_tokens: int = 32
    batch_size: int | None = None
    max_batch_tokens: int = 4096
    seed: int = 0
    benchmarks: RunSettings = field(default_factory=RunSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    answers: Path | None = None
    vllm: VllmInstall | None = None
    pool: Pool | None = None
