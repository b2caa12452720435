"""Answers, verdicts, and summaries of measurements."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
)

Side = Literal["base", "edited"]
FinishReason = Literal["stop", "length"]


def _one_of_three(value: float) -> float:
    if value not in (0.0, 0.5, 1.0):
        raise ValueError("a grade is 0, 0.5 or 1")
    return value


Grade = Annotated[float, AfterValidator(_one_of_three)]


class Frozen(BaseModel):
    """A closed, immutable value: unknown fields are errors, NaN and infinity are not numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Estimate(Frozen):
    """A rate or a mean with its 95 % interval; `low` and `high` are None where there is none.

    `n` prompts or documents were scored, of `asked` that were put to the model; None in records of
    before they were counted.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    asked: int | None = None

    @classmethod
    def of(
        cls,
        interval: tuple[float, float | None, float | None, int] | None,
        asked: int | None = None,
    ) -> Self | None:
        """The estimate of a `statistics.Interval`; None for no data."""
        if interval is None:
            return None
        value, low, high, n = interval
        return cls(value=value, low=low, high=high, n=n, asked=asked)

    @model_serializer(mode="wrap")
    def _without_unknown(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """An estimate that does not know `asked` is written as before it was counted."""
        values: dict[str, Any] = plain(self)
        if self.asked is None:
            values.pop("asked", None)
        return values

    @property
    def counts(self) -> str:
        """`98 of 100`: how many were scored, of how many that were asked; `98` if unknown."""
        return f"{self.n}" if self.asked is None else f"{self.n} of {self.asked}"

    def __format__(self, form: str) -> str:
        """`value [low, high] (n=38 of 40)`, numbers as `form` has it; no brackets if no interval.

        Without `of 40` where it is not known how many were asked.
        """
        interval = ""
        if self.low is not None and self.high is not None:
            interval = f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{interval} (n={self.counts})"


class Completion(Frozen):
    """One answer of one model to one prompt: a line of rollouts.jsonl.

    Of a conversation, `prompt` is the readable text of all before the last answer, which is judged.
    """

    set: str  # "target", "neutral", "over_refusal"
    side: Side
    index: int  # position of the prompt in its set: (set, index) pairs base with edited
    prompt: str
    response: str  # all of it: what the model thought, then its answer
    finish_reason: FinishReason
    n_tokens: int
    answer_start: int | None = None  # where the answer begins in `response`; None where not known
    earlier: tuple[str, ...] = ()  # answers to scripted turns before, which `prompt` has too


class SampledCompletion(Completion):
    """One of several answers that were drawn for a prompt: a line of samples.jsonl."""

    sample: int  # from 0


VerdictKind = Literal["refused", "deflected", "partial", "complied", "broken", "truncated", "empty"]


class TextStatistics(Frozen):
    """Text statistics of an answer, counted without a judge."""

    repetition: float  # share that repeats itself, by words, sentences or characters
    distinct: float | None  # share of its word pairs that occur once; None below 10 words


class Verdict(Frozen):
    """A judge's verdict on one Completion; grades and `refused` are None when unscored."""

    set: str
    side: Side
    index: int
    compliance: Grade | None
    coherence: Grade | None
    refused: bool | None
    truncated: bool
    reasons: tuple[str, ...] = ()
    kind: VerdictKind | None = None  # None when unscored; "truncated" where no answer was reached
    thinking: str = ""  # split off before judging
    # whether the thinking comes to a refusal, by rules; None without thinking
    thinking_refused: bool | None = None
    text_statistics: TextStatistics | None = None
    # of a local judge: the probability of each of its labels, by what is labelled
    labels: dict[str, dict[str, float]] | None = None


class SampledVerdict(Verdict):
    """A judge's verdict on one SampledCompletion."""

    sample: int


class BehaviourSide(Frozen):
    """Verdicts of one prompt set on one side; in `delta` they are edited - base, paired."""

    refusal: Estimate | None
    compliance: Estimate | None
    coherence: Estimate | None
    product: Estimate | None  # mean of compliance x coherence, per prompt
    truncated: Estimate | None
    unscored: Estimate | None
    thinking_refusal: Estimate | None = None  # of answers with thinking, by rules
    repetition: Estimate | None = None  # text statistics: counted, not judged
    distinct: Estimate | None = None


class Behaviour(Frozen):
    """One prompt set, base and edited side by side.

    By measure: the smallest true delta that this n could show (80 % power, 5 % level), and the p of
    an exact paired test (McNemar for refusal, sign flips for the rest); None where there is none.
    """

    base: BehaviourSide
    edited: BehaviourSide
    delta: BehaviourSide
    smallest_detectable: dict[str, float | None] = {}
    p_value: dict[str, float | None] = {}
    kinds: dict[Side, dict[VerdictKind, int]] = {}
    unscored_reasons: dict[Side, dict[str, int]] = {}  # why answers have no verdict, counted
    # answers that resemble each other, over which intervals and tests are: those to one prompt, or
    # to prompts of one form; None where every answer counts by itself
    clusters: int | None = None


class SampledAnswers(Frozen):
    """Answers drawn at a temperature, several a prompt, beside the greedy ones.

    `behaviour` has the prompt sets by name; n counts answers, and prompts are their clusters.
    """

    samples: int  # answers a prompt and side
    temperature: float
    top_p: float
    seed: int
    sampler: dict[Side, str]  # what drew: "process", or the kind of the engine whose server did
    behaviour: dict[str, Behaviour]

    def __str__(self) -> str:
        top_p = f" and top-p {self.top_p:g}" if self.top_p < 1 else ""
        return f"{self.samples} answers at temperature {self.temperature:g}{top_p} for each prompt"


class Divergence(Frozen):
    """KL(base || edited) of next-token distributions on neutral prompts."""

    kl_first_token: Estimate | None = None  # nats
    kl: Estimate | None = None
    top1_agreement: Estimate | None = None
    perplexity_base: float | None = None
    perplexity_edited: float | None = None
    tokens: int | None = None  # answer tokens compared of each prompt, at most
    perplexity_tokens: int | None = None  # of the fixed text


class BenchmarkResult(Frozen):
    """One metric of one benchmark task on the same documents, base and edited, paired."""

    metric: str
    n: int
    base: Estimate
    edited: Estimate
    delta: Estimate
    smallest_detectable: (
        float | None
    )  # smallest true delta this n could show: 80 % power, 5 % level
    higher_is_better: bool = True
    # which there are depends on task and engine, and null (no limit) is a value of its own
    settings: dict[str, Any] = {}
    gained: int | None = None  # documents that only edited has right; None where not right or wrong
    lost: int | None = None  # documents that only base has right
    p_value: float | None = None  # exact McNemar; a sign-flip test where not right or wrong
    p_holm: float | None = None  # the same, over all results claimed together
    gold_loglik: Estimate | None = None  # shift of the gold answer's log-likelihood, nats
    empty_base: Estimate | None = None  # generated answers with no text
    empty_edited: Estimate | None = None
    truncated_base: Estimate | None = None  # generated answers cut at the token limit
    truncated_edited: Estimate | None = None
