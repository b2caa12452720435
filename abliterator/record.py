"""Typed results, JSON both ways.

`RunRecord` is the contract that the card and other tools read
(`checkpoint/abliterator/record.json`). The room does not know where results come from. A
measurement that was not made is `None` (JSON `null`), never 0. Rates and means travel as
`Estimate`: a value with its interval and n.

    record = RunRecord.model_validate_json(read_text(path))
    record.behaviour["target"].base.refusal.value
"""

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
        """A `statistics.Interval` as it travels in a record; None for no data."""
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


VerdictKind = Literal["refused", "deflected", "partial", "complied", "broken", "truncated", "empty"]


class TextStatistics(Frozen):
    """How sound an answer's language is by counting alone, beside the judge's grades."""

    repetition: float  # share that repeats itself, by words, sentences or characters
    distinct: float | None  # share of its word pairs that occur once; None below 10 words


class Verdict(Frozen):
    """What a judge says of one Completion; grades and `refused` are None when unscored."""

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
    """How far the edited next-token distribution moved on neutral prompts: KL(base || edited)."""

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


class QuantizedEdits(Frozen):
    """The edited tensors of one quantised format, summed over `edits.json`."""

    format: str
    tensors: int
    unpacked: bool  # written as bfloat16; else in their own format
    max_leak: float | None
    noise: float | None  # root mean square of |W' - E| / |W|, E the exact edit
    noise_nearest: float | None  # the same by plain rounding


class EditSummary(Frozen):
    """What was done to the weights, summed over `edits.json`."""

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    k: int
    strength: dict[str, float | dict[str, float]]  # per component, or per blocks ("9-24") of it
    components: tuple[str, ...]
    norm: str
    rounding: str
    tensors: int | None  # None of an edit that was only planned, like what follows
    max_leak: float | None
    median_leak: float | None
    output_bytes: int | None
    edited_bytes: int | None
    quantized: tuple[QuantizedEdits, ...] = ()
    # routed experts of every block, or per blocks ("3-5"), where not all are edited; None for all
    experts: tuple[int, ...] | dict[str, Literal["all"] | tuple[int, ...]] | None = None


class TensorEdit(Frozen):
    """One edited tensor: an entry of edits.json."""

    name: str
    file: str
    component: str
    layer: int  # the block that writes; -1 for embeddings
    side: Literal["output"] = "output"  # the side of the matrix that lies in the residual stream
    axis: int  # the axis of the stored tensor that is this side
    gains: tuple[str, ...] = ()  # norms after the sublayer whose gains multiply what it writes
    dtype: str
    shape: tuple[int, ...]
    k: int
    subspace: Literal["all", "block"] = "all"  # Q is that of all blocks, or of this block alone
    strength: float
    experts: tuple[int, ...] | None = None  # those edited of a tensor of several; None for all
    storage: str | None = None  # how the base has it in units of scales, if it does
    unpacked: bool = False  # written as plain numbers (BF16) though the base's were quantised
    leak: float | None  # |Qᵀ W'| / |Qᵀ W| of the stored bytes; None if W wrote nothing there
    noise: float | None = None  # of quantised tensors: |W' - E| / |W|, E the exact edit
    noise_nearest: float | None = None  # the same had every number been rounded to its nearest
    sha256_before: str
    sha256_after: str


class ModelIdentity(Frozen):
    """Which base model: a Hub id at a commit, or a local folder known by its files' hashes."""

    id: str
    revision: str | None
    n_layers: int
    d_model: int
    model_type: str
    license: str | None = None  # its id on the Hub
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    files_sha256: dict[str, str] = {}
    gating: dict[str, Any] = {}  # what a gated base asks of its users: extra_gated_* of its card


class Tool(Frozen):
    """Which abliterator made this."""

    name: str = "abliterator"
    version: str


class JudgeIdentity(Frozen):
    """Which judge gave the verdicts; `calibration` is None where it was never measured."""

    kind: str
    model: str | None = None
    prompt_sha256: str | None = None
    version: str
    calibration: dict[str, Any] | None = None
    base_url: str | None = None
    served_model: str | None = None  # as the server called itself
    fingerprints: tuple[str, ...] = ()
    structured: str | None = None  # how JSON was asked for; a server may take it and not heed it
    votes: int = 1
    disagreement: dict[str, Estimate] = {}  # share of other verdicts: "itself", "rules"
    usage: dict[str, float] = {}  # calls, invalid (replies that were no verdict), usd


class PromptOrigin(Frozen):
    """Where one prompt set came from, and what it was after loading."""

    name: str
    source: str  # Hub dataset id, or file name
    revision: str | None
    split: str | None = None
    n: int
    sha256: str  # of the prompts as used
    read: int | None = None  # prompts in the source; None in records of before it was counted
    dropped: int = 0  # of those: duplicates, empty rows, and what an evaluation set has too
    overlap: int = 0  # of those dropped, what an evaluation set has too
    near: int | None = None  # of n, near duplicates of an evaluation prompt; None: not compared
    license: str | None = None


class Provenance(Frozen):
    """Versions and circumstances that a number depends on: the lock of a build.

    Whoever builds the recipe again compares these first where a bit differs.
    """

    created: str  # UTC, ISO 8601
    python: str
    platform: str
    packages: dict[str, str]
    device: str
    dtype: str
    hardware: str | None = None  # what computes: a GPU's name, or a CPU's instruction set
    digests: dict[str, str] = {}  # sha256 of what the weights were made from: moments, directions
    git_commit: str | None = None
    prompts: tuple[PromptOrigin, ...] = ()
    dropped_overlap: int = 0  # prompts of extraction sets that an evaluation set has too
    near_duplicate: float | None = None  # letter-trigram similarity of what `near` counts


class Quotation(Frozen):
    """What somebody else reports, on other files; nothing of it was measured here."""

    source: str
    says: str


class RunRecord(Frozen):
    """Everything a card says: the contract that other tools read."""

    tool: Tool
    recipe: dict[str, Any]
    recipe_digest: str
    model: ModelIdentity
    edit: EditSummary
    behaviour: dict[str, Behaviour | None] = {}
    divergence: Divergence | None = None
    benchmarks: dict[str, BenchmarkResult] = {}
    judge: JudgeIdentity | None = None
    selection: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    timing: dict[str, float] = {}
    quoted: tuple[Quotation, ...] = ()
    pictures: dict[str, str] = {}  # sha256 by path in the checkpoint; the card shows them
    provenance: Provenance
