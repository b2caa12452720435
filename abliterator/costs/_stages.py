"""What each stage of a build costs, from what the recipe asks of a model on a machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from abliterator.costs._engine import engine_start, on_engine
from abliterator.costs._machine import REFERENCE
from abliterator.costs._passes import Work
from abliterator.costs._rows import working_bytes
from abliterator.costs._types import Answerer, Answers, Batch, Benchmark, Setup, StageCost

# Seconds of Python code on the machine whose `Machine.python` is `REFERENCE`: they do not depend on
# the model, and were measured with the demo's.
_START = 2.0  # imports of torch and transformers, and the checks before the first stage
_FIRST = 0.7  # of the first forward passes of a process, which import and allocate
_BAKE = 0.25
_LOAD = 0.1  # to load a model
_RECORD = 0.6
_CHILD = 6.5  # imports of lm-eval and its libraries in a process of its own
_DOCUMENT = 7e-4  # to make and score one sequence of lm-eval
_PATH = 2e-3  # to compare one path on one side
_PROMPT = 2e-3  # reading, comparing and rendering one prompt
_JUDGE, _VERDICT = 0.1, 4e-4  # of the rule judge: its tables, and one verdict
_TENSOR = 2e-3  # to edit one tensor, beside its numbers

# What transformers does with each number of the weights, in writes to new memory: shapes are
# checked and initialised, tensors read and converted.
_LOAD_COPIES = 12
# Tokens, at least, of the prompt with which `abliterator.model` tests whether padding changes
# answers, and how many it generates; once for each model that is loaded.
_PADDED, _PROBED = 256, 3
# Reads and writes of a number while a tensor is edited, in float32, rounded to nearest and
# compensated.
_EDIT_COPIES = {"nearest": 40, "compensated": 90}
# A preview multiplies what every writer writes with Q twice; on a CPU hooks cost a few calls.
_PREVIEW = 1.1
# A backward pass through frozen weights makes gradients of activations alone.
_FORWARD_AND_BACKWARD = 2.2
_SHARD = 5 << 30  # bytes of a file of weights
# Bytes beside `Machine.base_memory` of the libraries that a build imports.
_LIBRARIES = 200 << 20
# Passages of the text whose perplexity both sides take, and tokens of one.
_PASSAGES, _PASSAGE = 8, 120
# Copies of the logits of one batch: float32, log-probabilities of both sides, float64.
_COMPARE_COPIES = 16
_LOGIT_BATCH = 32 << 20  # bytes of logits of one batch of `abliterator.engines`
_SCORE_CONTINUATIONS = 3  # openings of refusals that a selection learns at most
_SCORE_TOKENS = 3  # of one of them


class Costs:
    """Costs of stages of a model on a machine; memory is that of the whole process."""

    def __init__(self, work: Work, setup: Setup | None = None) -> None:
        self.machine, self.setup = work.machine, setup or Setup()
        self.work = replace(work, on_disk=self.setup.on_disk, streams=self.setup.streams)
        self._engine = on_engine(self.work, self.setup.engine_devices)

    def stage(
        self,
        name: str,
        seconds: float,
        *,
        batch: Batch | None = None,
        loads: int = 0,
        disk: int = 0,
        read: float = 0,
        answered: float = 0,
    ) -> StageCost:
        """A stage's cost with the memory that it needs while a model runs.

        Args:
            name: of the stage.
            seconds: beside loading.
            batch: the largest; None where no model runs.
            loads: how often a model is placed in memory, and on disk where it has to be.
            disk: bytes written.
            read: tokens of prompts.
            answered: tokens of answers.
        """
        work, machine = self.work, self.machine
        rows, tokens, logits = batch or Batch()
        working = working_bytes(
            work.shape, rows, tokens, logits=logits, number_bytes=work.number_bytes
        )
        base = machine.base_memory + _LIBRARIES
        # of a model that is read block by block, one block is in memory
        block = work.streams and not loads
        held = work.weight_bytes // work.shape.n_layers if block else work.weight_bytes
        model = (held if block else held - work.on_disk) if batch else 0
        on_device = machine.accelerator
        # pages of the files that are read; for an accelerator shard by shard
        loading = min(work.shape.stored, _SHARD if on_device else work.shape.stored) * bool(loads)
        return StageCost(
            stage=name,
            seconds=seconds + loads * self.load_seconds(),
            host_memory=base + (loading if on_device else model + max(loading, working)),
            device_memory=model + working if on_device else 0,
            read_tokens=round(read),
            answer_tokens=round(answered),
            disk=disk + loads * work.on_disk,
        )

    def python(self, seconds: float) -> float:
        """Seconds of Python code here that takes `seconds` on the machine of `REFERENCE`."""
        return seconds * self.machine.python / REFERENCE

    def load_seconds(self) -> float:
        """Seconds to read a model, convert it, and try it with a first pass and two tokens."""
        shape, machine = self.work.shape, self.machine
        tried = self.work.forward(1, 14, logits=1) + 2 * self.work.forward(1, 1, logits=1)
        return (
            self.python(_LOAD)
            + shape.stored / machine.disk_read
            + _LOAD_COPIES * self.work.weight_bytes / machine.fresh
            + self.work.on_disk / machine.disk_write
            + self.work.read_again(3)
            + tried
        )

    def start(self, prompts: int) -> StageCost:
        """Imports, checks, hashes of the base, and the prompts, which are all rendered once."""
        hashed = self.work.shape.stored / self.machine.hashing
        seconds = self.python(_START + _PROMPT * prompts) + hashed
        return self.stage("prompts", seconds)

    def capture(self, sets: Iterable[Sequence[int]], max_tokens: int) -> StageCost:
        """Every prompt through the blocks once, in batches of one length."""
        lengths = list(sets)
        passes = sum(self.work.scores(s, max_tokens) for s in lengths)
        workers = self.python(_START) if self.setup.speedup > 1 else 0.0  # they start together
        seconds = self.python(_FIRST) + workers + self.divided(passes)
        tokens = sum(map(sum, lengths))
        loads = 0 if self.work.streams else 1
        return self.stage("capture", seconds, batch=Batch(1, max_tokens), loads=loads, read=tokens)

    def divided(self, seconds: float) -> float:
        """Seconds of work that workers share."""
        return seconds / self.setup.speedup

    def answers(self, answers: Answers, by: Answerer = "process") -> float:
        """Seconds of greedy answers; 0 where they come from a server elsewhere."""
        if not answers.lengths or by == "server":
            return 0.0
        work, size = self.work, answers.batch_size
        if by == "engine":
            work, size = self._engine, self.setup.engine_batch
        mean = sum(answers.lengths) / len(answers.lengths)
        shared = min(answers.shared, mean - 1)
        seconds = work.answers(len(answers.lengths), mean, answers.tokens, size, shared=shared)
        return self.divided(seconds) if by == "process" else seconds

    def probe(self, sets: Sequence[Answers]) -> float:
        """Seconds in which a loaded model shows whether it may pad its prompts."""
        widths = [n + answers.tokens for answers in sets for n in answers.lengths]
        width = max(_PADDED, *widths) if widths else 0
        steps = 2 * (_PROBED - 1)
        seconds = self.work.forward(1, width) + self.work.forward(1, width / 4)
        seconds += steps * self.work.forward(1, 1, logits=1)
        return seconds + self.work.read_again(2 + steps)

    def rollouts(self, sets: Sequence[Answers]) -> StageCost:
        """The answers of base and edited, each loaded once, or served by an engine.

        Of an engine or a server, memory is not counted, and of a server elsewhere no time.
        """
        by = self.setup.answers
        here = by == "process"
        begun = self.begin(by, self.probe(sets))
        return self.stage(
            "rollouts",
            2 * (begun + sum(self.answers(s, by) for s in sets)),
            loads=2 if here else 0,
            read=2 * sum(sum(s.lengths) for s in sets),
            answered=2 * sum(len(s.lengths) * s.tokens for s in sets),
            batch=_largest(sets) if here else None,
        )

    def begin(self, by: Answerer, probe: float) -> float:
        """Seconds before the first answer of what answers, beside loading in this process."""
        if by == "server":
            return 0.0
        return engine_start(self.work) if by == "engine" else probe

    def divergence(self, answers: Answers, max_tokens: int) -> StageCost:
        """The base's answers, logits along them of base and edited, and both perplexities."""
        lengths = [n + answers.tokens for n in answers.lengths]
        positions, work = len(lengths) * answers.tokens, self.work
        rows = self._logit_rows(answers.tokens)
        passes = 2 * work.scores(
            lengths, min(max_tokens, rows * max(lengths, default=1)), positions=answers.tokens
        )
        passes += 2 * work.scores([_PASSAGE] * _PASSAGES, _PASSAGE, positions=_PASSAGE)
        by = self.setup.answers
        here = by == "process"
        stored = int(positions * work.shape.vocabulary * work.number_bytes)
        compared = positions * work.logit_seconds(_COMPARE_COPIES)
        files = stored / self.machine.disk_write + stored / self.machine.disk_read
        files += 2 * self.python(_PATH) * len(lengths)
        return self.stage(
            "divergence",
            # an engine of the base runs since it answered the evaluation prompts
            here * self.probe([answers])
            + self.answers(answers, by)
            + self.divided(passes)
            + compared
            + files,
            loads=here if work.streams else 2,
            disk=stored,
            read=sum(answers.lengths) + 2 * sum(lengths),
            answered=positions,
            batch=_largest([answers], logits=rows * answers.tokens),
        )

    def _logit_rows(self, positions: int) -> int:
        size = positions * self.work.shape.vocabulary * self.work.number_bytes
        return max(1, int(_LOGIT_BATCH // max(1, size)))

    def benchmarks(self, tasks: Sequence[Benchmark], batch_size: int) -> StageCost:
        """lm-eval on both sides, each in a process of its own, or by an engine or a server."""
        if not tasks:
            return StageCost(stage="benchmarks", seconds=0.0)
        by = self.setup.benchmarks
        seconds = sum(self.benchmark(task, batch_size, by) for task in tasks)
        if by == "process":  # workers score one task on one side at a time
            seconds /= min(self.setup.speedup, 2 * len(tasks))
        longest = max(task.tokens + task.generated for task in tasks)
        rows = max(min(batch_size, task.documents * task.requests) for task in tasks)
        scored = max((task.tokens for task in tasks if not task.generated), default=1)
        here = by == "process"
        return self.stage(
            "benchmarks",
            2 * (seconds + self.python(_CHILD) + self.begin(by, 0.0)),
            batch=Batch(rows, longest, rows * scored) if here else None,
            loads=2 if here else 0,
            read=2 * sum(task.documents * task.requests * task.tokens for task in tasks),
            answered=2 * sum(task.documents * task.requests * task.generated for task in tasks),
        )

    def benchmark(self, task: Benchmark, batch_size: int, by: Answerer = "process") -> float:
        """Seconds of one task on one side; of a server elsewhere those of lm-eval alone."""
        sequences = task.documents * task.requests
        seconds = self.python(_DOCUMENT * sequences)
        if by == "server":
            return seconds
        work, size = (
            (self.work, batch_size) if by == "process" else (self._engine, self.setup.engine_batch)
        )
        if task.generated:
            return seconds + work.answers(sequences, task.tokens, task.generated, size)
        whole, rest = divmod(sequences, size)
        for rows, times in ((size, whole), (rest, 1)):
            logits = rows * task.tokens  # lm-eval makes those of every position
            seconds += times * work.forward(rows, task.tokens, logits=logits)
            seconds += times * (logits * work.logit_seconds() + work.read_again())
        return seconds

    def selection(
        self,
        *,
        places: int,
        scored: Answers,
        judged: Answers,
        candidates: float,
        neutral: Sequence[int],
        kl_tokens: int,
        max_tokens: int,
    ) -> StageCost:
        """Scores of all places from distributions, and judged answers.

        Args:
            places: candidates that are scored; 0 where layers are given.
            scored: the prompts of the scores, of one kind, with the base's answers to them.
            judged: the held-out target prompts.
            candidates: answers to one prompt, so many times the prompts of `judged`.
            neutral: tokens of the held-out neutral prompts.
            kl_tokens: positions that are compared of each.
            max_tokens: of one batch.
        """
        by = self.setup.candidates
        probe = self.probe([judged])
        base = self.begin(by, probe) + probe + self.answers(judged, by) + self.answers(scored, by)
        base += self.answers(judged._replace(lengths=neutral, tokens=kl_tokens), by)
        rests = [max(1, n - scored.shared) for n in scored.lengths]
        along = [max(1, n - scored.shared) + kl_tokens for n in neutral[: len(rests)]]
        openings = [n + _SCORE_CONTINUATIONS * _SCORE_TOKENS for n in rests]
        scores = 2 * self.work.scores(openings * places, max_tokens, positions=1)
        scores += self.work.scores(along * places, max_tokens, positions=kl_tokens)
        n = round(candidates * len(judged.lengths))
        mean = sum(judged.lengths) / max(1, len(judged.lengths))
        edited = self.answers(judged._replace(lengths=[round(mean)] * n), by)
        edited *= _PREVIEW if by == "process" else 1
        tokens = len(openings) * places * 2 * (sum(openings) / max(1, len(openings)))
        return self.stage(
            "selection",
            base + _PREVIEW * self.divided(scores) + edited,
            # answers need weights that are placed: of the base, and of candidates after scores
            loads=2 * (self.work.streams and by == "process"),
            read=tokens + n * mean,
            answered=(n + len(judged.lengths) + len(scored.lengths)) * judged.tokens,
            batch=_largest([judged._replace(lengths=[round(mean)] * max(n, 1))]),
        )

    def tuning(
        self,
        *,
        steps: int,
        batch: int,
        learned: Answers,
        trials: int,
        raced: float,
        judged: Answers,
        neutral: Sequence[int],
        phases: int,
        max_tokens: int,
        induces: bool = False,
    ) -> StageCost:
        """Steps by gradients, answers to learn from before each phase, and judged trials.

        Args:
            steps: in all.
            batch: preference pairs of a step, and neutral rows.
            learned: prompts of one kind that are learned from, and how long answers are.
            trials: edits that are judged.
            raced: answers of all of them together to one held-out prompt, as a rule.
            judged: the held-out target prompts.
            neutral: tokens of the held-out neutral prompts.
            phases: between which responses are asked for anew.
            max_tokens: of one batch.
            induces: whether refusals run too, after the neutral prompts of a step.
        """
        alone = Costs(self.work, self.setup._replace(speedup=1.0))  # workers have no part in it
        row = sum(learned.lengths) / max(1, len(learned.lengths)) + learned.tokens
        t, rest = learned.tokens, max(0.0, row - learned.tokens - learned.shared)
        # an answer and a refusal follow one prompt, and neutral answers theirs
        rows = 3 + induces
        tokens = batch * ((2 + induces) * rest + rows * t) + (2 + induces) * learned.shared
        step = self.work.forward(batch, rest + t, logits=batch * t) + self.work.read_again(rows)
        along = self.work.forward(1, tokens, logits=rows * batch * t)
        step += _FORWARD_AND_BACKWARD * along * _PREVIEW
        asked = alone.answers(learned._replace(lengths=[*learned.lengths] * 3))
        asked += phases * alone.answers(learned._replace(tokens=judged.tokens))
        paths = [max(1, n + t - judged.shared) for n in neutral] * trials
        rounds = judged._replace(lengths=[*judged.lengths] * round(raced))
        measured = self.work.scores(paths, max_tokens, positions=t) + alone.answers(rounds)
        kept = rows * batch * row * self.work.shape.n_layers * self.work.shape.d_model * 4
        cost = self.stage(
            "tuning",
            steps * step + asked + self.probe([judged]) + _PREVIEW * measured,
            loads=1 if self.work.streams else 0,
            read=steps * (rows + 1) * batch * row + sum(paths),
            answered=len(rounds.lengths) * judged.tokens,
            batch=_largest([judged]),
        )
        where = "device_memory" if self.machine.accelerator else "host_memory"
        return cost.model_copy(update={where: getattr(cost, where) + int(kept * _GRAPH)})

    def bake(
        self, *, read: int, written: int, edited: int, tensors: int, rounding: str, memory: int
    ) -> StageCost:
        """The files copied, their edited tensors computed, and all of them hashed.

        Args:
            read: bytes of the base.
            written: bytes of the edited checkpoint.
            edited: numbers of the edited tensors.
            tensors: that are edited.
            rounding: of the recipe.
            memory: bytes that the edit holds.
        """
        machine = self.machine
        copied = read / machine.disk_read + written / machine.disk_write + written / machine.hashing
        # on the processors, each tensor by one thread
        rate = machine.fresh if machine.accelerator else machine.bandwidth
        one_thread = edited * 4 * _EDIT_COPIES[rounding] / rate * machine.threads
        computed = one_thread / self.setup.bake_workers
        seconds = copied + computed + self.python(_BAKE + _TENSOR * tensors)
        cost = self.stage("bake", seconds, disk=written)
        return cost.model_copy(update={"host_memory": cost.host_memory + memory})

    def judge(self, answers: int) -> StageCost:
        """Verdicts of the rule judge."""
        return self.stage("judge", self.python(_JUDGE + _VERDICT * answers))

    def record(self) -> StageCost:
        """The record and the card."""
        return self.stage("record", self.python(_RECORD))


# Numbers that a backward pass keeps of each token and block, in units of the residual stream.
_GRAPH = 24


def _largest(sets: Sequence[Answers], *, logits: int = 0) -> Batch:
    """The largest batch of answers."""
    rows = max((min(s.batch_size, len(s.lengths)) for s in sets), default=0)
    tokens = max((max(s.lengths, default=0) + s.tokens for s in sets), default=0)
    return Batch(rows, tokens, max(rows, logits))
