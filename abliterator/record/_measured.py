"""Answers, verdicts, and summaries of measurements."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict

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
    """A rate or a mean with its 95 % interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, interval: tuple[float, float | None, float | None, int] | None) -> Self | None:
        """The estimate of a `statistics.Interval`; None for no data."""
        if interval is None:
            return None
        value, low, high, n = interval
        return cls(value=value, low=low, high=high, n=n)

    def __format__(self, form: str) -> str:
        """`value [low, high] (n=40)`, numbers as `form` has it; no brackets without an interval."""
        interval = ""
        if self.low is not None and self.high is not None:
            interval = f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{interval} (n={self.n})"


class Completion(Frozen):
    """One answer of one model to one prompt: a line of rollouts.jsonl."""

    set: str  # "target", "neutral", "over_refusal"
    side: Side
    index: int  # position of the prompt in its set: (set, index) pairs base with edited
    prompt: str
    response: str  # all of it: what the model thought, then its answer
    finish_reason: FinishReason
    n_tokens: int
    answer_start: int | None = None  # where the answer begins in `response`; None where not known


# "hedged": complied, with a caveat; records from before it count these among "complied"
VerdictKind = Literal[
    "refused", "deflected", "partial", "hedged", "complied", "broken", "truncated", "empty"
]


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
    text_statistics: TextStatistics | None = None


class BehaviourSide(Frozen):
    """Verdicts of one prompt set on one side; in `delta` they are edited - base, paired."""

    refusal: Estimate | None
    compliance: Estimate | None
    coherence: Estimate | None
    product: Estimate | None  # mean of compliance x coherence, per prompt
    truncated: Estimate | None
    unscored: Estimate | None
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
    """One metric of one lm-eval task on the same documents, base and edited, paired."""

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
