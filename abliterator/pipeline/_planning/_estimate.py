"""The cost of a build, stage by stage: what its recipe asks for, on a measured machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from abliterator.anatomy import anatomy_of
from abliterator.costs import (
    Answers,
    Batch,
    Costs,
    Machine,
    Setup,
    StageCost,
    Work,
    rows_that_fit,
    shape_of,
)
from abliterator.errors import CheckpointError, UnsupportedModel
from abliterator.pipeline._local_judge import judge_on_disk
from abliterator.pipeline._planning._plan import Plan
from abliterator.pipeline._planning._planned_benchmarks import planned_benchmarks
from abliterator.pipeline._planning._planned_prompts import PlannedPrompts
from abliterator.recipe import JudgeSettings, Recipe

# Sizes of stacks that `k: auto` tries before one is no better, as a rule.
_USUAL_STACKS = 2
# Positions that a sweep over positions tries, as a rule: tokens after the prompt.
_USUAL_POSITIONS = 5
_KL_TOKENS = 4  # of `abliterator.selection`
# Tokens of the judge's rubric and frame, and of a reply; seconds of a call.
_RUBRIC, _VERDICT, _CALL = 560, 60, 3.0
# Passes over labels of one answer, and tokens of a label: most need none of their own.
_LABEL_PASSES, _LABEL = 5, 4
_TOGETHER = 4096  # tokens of a batch that a local judge reads
_MILLION = 1_000_000


class JudgeCost(BaseModel):
    """What a judge behind a server is asked.

    Attributes:
        calls: requests.
        read_tokens: of questions, about.
        answer_tokens: of replies, about.
        dollars: by the recipe's prices; None where it has none.
        seconds: at `concurrency` calls at a time, of three seconds each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    calls: int
    read_tokens: int
    answer_tokens: int
    dollars: float | None
    seconds: float


class Estimate(BaseModel):
    """The cost of a build on one machine.

    Attributes:
        machine: its device, as its maker calls it.
        measured: date on which its rates were measured.
        dtype: of computation.
        stages: in their order.
        judge: where a server judges.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str
    measured: str
    dtype: str
    stages: tuple[StageCost, ...]
    judge: JudgeCost | None = None

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def host_memory(self) -> int:
        """Bytes of the largest process at its peak."""
        return max(stage.host_memory for stage in self.stages)

    @property
    def device_memory(self) -> int:
        """Bytes on the accelerator at the peak; 0 where the CPU computes."""
        return max(stage.device_memory for stage in self.stages)

    @property
    def answer_tokens(self) -> int:
        """Tokens that are generated at most."""
        return sum(stage.answer_tokens for stage in self.stages)

    @property
    def disk(self) -> int:
        """Bytes that are written."""
        return sum(stage.disk for stage in self.stages)

    def summary(self) -> dict[str, Any]:
        """The estimate as plain values with its sums, for `--json` and for people."""
        sums = ("seconds", "host_memory", "device_memory", "answer_tokens", "disk")
        return {**self.model_dump(), **{name: getattr(self, name) for name in sums}}


def estimate(
    recipe: Recipe, plan: Plan, prompts: PlannedPrompts, machine: Machine, setup: Setup
) -> Estimate:
    """The cost of every stage of a recipe's build.

    Args:
        recipe: what is built.
        plan: of it.
        prompts: of it; without them nothing can be counted.
        machine: where it runs, in the dtype of computation.
        setup: how it uses the machine.
    """
    counted = _Counted(recipe, plan, prompts, Costs(_work(plan, machine), setup))
    return Estimate(
        machine=machine.name,
        measured=machine.measured,
        dtype=machine.dtype,
        stages=tuple(counted.stages()),
        judge=counted.judge_cost(),
    )


def _work(plan: Plan, machine: Machine) -> Work:
    return Work(shape_of(plan.checkpoint, plan.anatomy), machine)


@dataclass(frozen=True)
class _Counted:
    """A recipe's work, and what it costs."""

    recipe: Recipe
    plan: Plan
    prompts: PlannedPrompts
    costs: Costs

    def stages(self) -> list[StageCost]:
        """Of every stage that the recipe has, in order."""
        recipe, costs = self.recipe, self.costs
        stages = [costs.start(sum(map(len, self.prompts.lengths.values()))), self._capture()]
        stages += [self._selection()] if recipe.selects else []
        stages += [self._tuning()] if recipe.tunes else []
        stages += [self._bake(), costs.rollouts(self._evaluated())]
        stages.append(self._judge())
        limit = recipe.divergence.limit
        neutral = self._batched(
            self.prompts.of("neutral", "evaluation", limit), recipe.divergence.tokens
        )
        stages.append(costs.divergence(neutral, recipe.capture.max_batch_tokens))
        benchmarks = planned_benchmarks(recipe.benchmarks, self.prompts.around)
        stages.append(costs.benchmarks(benchmarks, recipe.benchmarks.batch_size))
        return [*stages, costs.record()]

    def _batched(self, lengths: Sequence[int], tokens: int, shared: int = 0) -> Answers:
        """Answers in batches of `rollouts.batch_size`."""
        return self._in_batches(self.recipe.rollouts.batch_size, lengths, tokens, shared)

    def _in_batches(
        self, size: int | Literal["auto"], lengths: Sequence[int], tokens: int, shared: int
    ) -> Answers:
        work = self.costs.work
        if size == "auto":
            size = rows_that_fit(
                lambda: work.shape,
                tokens=max(lengths, default=0) + tokens,
                device=work.machine.device,
                memory=work.machine.memory * self.costs.setup.devices,
                number_bytes=work.number_bytes,
            )
        return Answers(lengths, tokens, size, shared)

    def _capture(self) -> StageCost:
        unused = "" if self.recipe.needs_neutral_mean else "neutral"
        capture, before = self.recipe.capture, self.prompts.before
        sets = [
            [before, *(n - before for n in lengths)] if capture.share_prefix else lengths
            for name, lengths in self.prompts.lengths.items()
            if name.endswith(", extraction") and name != f"{unused}, extraction"
        ]
        cost = self.costs.capture(sets, capture.max_batch_tokens)
        stored = self._stored_vectors()
        # twice in memory: the vectors, and the bytes of their file
        return cost.model_copy(
            update={"disk": cost.disk + stored, "host_memory": cost.host_memory + 2 * stored}
        )

    def _stored_vectors(self) -> int:
        """Bytes of single prompts' activations, of those sets that are stored."""
        names, anatomy = self.recipe.directions.stored_sets, self.plan.anatomy
        positions = len(self.recipe.directions.positions) or _USUAL_POSITIONS
        of_sets = {n: len(self.prompts.of(n, "extraction")) for n in ("target", "contrast")}
        # of pairs both sides are captured, and their differences are kept
        n = sum(of_sets.values()) if "differences" in names else 0
        n = n or sum(of_sets.get(name, 0) for name in names)
        return 4 * n * positions * anatomy.n_layers * anatomy.d_model

    def _evaluated(self) -> list[Answers]:
        """The answers of a side, greedy and drawn."""
        settings = self.recipe.rollouts
        return [
            self._batched(lengths[: settings.limit], settings.most_tokens)
            for name, lengths in self.prompts.lengths.items()
            if name.endswith(", evaluation")
        ] * (1 + settings.samples)

    def _selection(self) -> StageCost:
        settings, recipe, cost = self.recipe.selection, self.recipe, self.plan.selection or {}
        positions = len(recipe.directions.positions) or _USUAL_POSITIONS
        scored = self.prompts.of("contrast", "extraction", settings.scored)
        held_out, before = self.prompts.of("target", "selection"), self.prompts.before
        return self.costs.selection(
            places=len(self.plan.layers) * positions if recipe.sweeps else cost["candidates"],
            scored=self._in_batches(settings.batch_size, scored, settings.tokens, before),
            judged=self._in_batches(settings.batch_size, held_out, settings.tokens, before),
            candidates=self._candidates(),
            neutral=self.prompts.of("neutral", "selection"),
            kl_tokens=_KL_TOKENS,
            max_tokens=recipe.capture.max_batch_tokens,
        )

    def _candidates(self) -> float:
        """Answers of candidates and stacks to one held-out prompt, as a rule."""
        settings, cost = self.recipe.selection, self.plan.selection or {}
        raced = self._raced(cost["judged"]) if cost.get("candidates") else 0.0
        stacks = min(_USUAL_STACKS, cost.get("stacks", 0))
        return raced + stacks * (1 + 2 * settings.controls)

    def _raced(self, candidates: int) -> float:
        """Answers to one held-out prompt of candidates that are raced, as a rule."""
        settings, raced, answered = self.recipe.selection, 0, 0
        for racing, reached in settings.schedule(candidates, settings.prompts, 1):
            raced += racing * (reached - answered)
            answered = reached
        return raced / settings.prompts

    def _tuning(self) -> StageCost:
        tuning, cost = self.recipe.tuning, self.plan.tuning or {}
        settings = self.recipe.selection
        lengths = self.prompts.of("target", "extraction", tuning.prompts)
        return self.costs.tuning(
            steps=cost["steps"],
            batch=tuning.batch,
            learned=self._in_batches(
                settings.batch_size, lengths, tuning.tokens, self.prompts.before
            ),
            trials=cost["trials"],
            raced=self._raced(cost["trials"]),
            judged=self._in_batches(
                settings.batch_size,
                self.prompts.of("target", "selection"),
                settings.tokens,
                self.prompts.before,
            ),
            neutral=self.prompts.of("neutral", "selection"),
            phases=len(tuning.kl_weights),
            induces=tuning.induce > 0,
            max_tokens=self.recipe.capture.max_batch_tokens,
        )

    def _bake(self) -> StageCost:
        plan = self.plan
        return self.costs.bake(
            read=plan.checkpoint.total_bytes,
            written=plan.output_bytes,
            edited=sum(math.prod(edit.info.shape) for edit in plan.edits.edits),
            tensors=len(plan.edits.edits),
            rounding=plan.edits.settings.rounding,
            memory=plan.edit_memory * self.costs.setup.bake_workers,
        )

    def _judge(self) -> StageCost:
        if self.recipe.judge.kind == "local":
            return local_judge_cost(self._judged(), self._judge_work)
        cost = self.judge_cost()
        if cost is None:
            return self.costs.judge(self._answers)
        return StageCost(stage="judge", seconds=cost.seconds)

    @property
    def _answers(self) -> int:
        """Answers of base and edited that are judged."""
        return 2 * sum(len(answers.lengths) for answers in self._evaluated())

    def judge_cost(self) -> JudgeCost | None:
        """Calls of the judge; None for one that is not behind a server."""
        if self.recipe.judge.kind != "openai":
            return None
        return judge_cost(self.recipe.judge, self._judged())

    def _judged(self) -> list[tuple[int, int]]:
        """Tokens of question and answer of all that the recipe's judge grades."""
        evaluated = [(n, a.tokens) for a in self._evaluated() for n in a.lengths] * 2
        return [*evaluated, *self._chosen()]

    @property
    def _judge_work(self) -> Work | None:
        """The local judge on this machine; None where its files or its type are not known."""
        with suppress(CheckpointError, UnsupportedModel):
            checkpoint = judge_on_disk(self.recipe.judge, self.plan.checkpoint)
            if checkpoint is not None:
                shape = shape_of(checkpoint, anatomy_of(checkpoint.config))
                return Work(shape, self.costs.work.machine)
        return None

    def _chosen(self) -> list[tuple[int, int]]:
        """Tokens of question and answer where the recipe's judge grades candidates and trials."""
        recipe = self.recipe
        if recipe.selection.judge != "recipe":
            return []
        edits = 1 + self._candidates() if recipe.selects else 0.0
        edits += (self.plan.tuning or {}).get("trials", 0) * 2
        lengths = self.prompts.of("target", "selection")
        return [(n, recipe.selection.tokens) for n in lengths] * round(edits)


def local_judge_cost(judged: Sequence[tuple[int, int]], work: Work | None) -> StageCost:
    """What it costs to judge answers by a model of this process, which is loaded for it.

    Args:
        judged: tokens of each question and of its answer, at most.
        work: the model; None where it is not known, and so is its cost.
    """
    if work is None:
        return StageCost(stage="judge", seconds=0.0)
    lengths = [_RUBRIC + question + answer for question, answer in judged]
    mean = sum(lengths) / max(1, len(lengths))
    labels = _LABEL_PASSES * work.forward(1, _LABEL, cached=mean, logits=_LABEL)
    seconds = work.scores(lengths, _TOGETHER, positions=1) + len(lengths) * labels
    longest = Batch(1, max(lengths, default=0), _LABEL)
    return Costs(work).stage("judge", seconds, batch=longest, loads=1, read=sum(lengths))


def judge_cost(settings: JudgeSettings, judged: Sequence[tuple[int, int]]) -> JudgeCost:
    """What it costs to judge answers.

    Args:
        settings: of the judge.
        judged: tokens of each question and of its answer, at most.
    """
    times = settings.votes * (1 + settings.rejudge)
    calls = math.ceil(len(judged) * times)
    read = round(sum(_RUBRIC + question + answer for question, answer in judged) * times)
    written = calls * _VERDICT
    prices = settings.prices
    dollars = prices and (read * prices.input + written * prices.output) / _MILLION
    seconds = calls * _CALL / settings.concurrency
    return JudgeCost(
        calls=calls, read_tokens=read, answer_tokens=written, dollars=dollars, seconds=seconds
    )
