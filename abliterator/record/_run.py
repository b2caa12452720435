"""The record of a run: the contract that the card and other tools read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, Field, SerializerFunctionWrapHandler, model_serializer

from abliterator.record._directions import DirectionChecks
from abliterator.record._groups import Grouping
from abliterator.record._measured import (
    Behaviour,
    BenchmarkResult,
    Divergence,
    Estimate,
    Frozen,
    SampledAnswers,
)
from abliterator.record._selection import Selection
from abliterator.record._side_effects import ConfidenceFigure, PairedFigure, SideEffect
from abliterator.record._survival import Survival
from abliterator.record._tuning import Tuning


class QuantizedEdits(Frozen):
    """The edited tensors of one quantised format, summed over `edits.json`."""

    format: str
    tensors: int
    # written as bfloat16; else in their own format; "unpacked" in records of 0.1
    dequantized: bool = Field(validation_alias=AliasChoices("dequantized", "unpacked"))
    max_leak: float | None
    noise: float | None  # root mean square of |W' - E| / |W|, E the exact edit
    noise_nearest: float | None  # the same by plain rounding


class EditSummary(Frozen):
    """The edit of the weights, summed over `edits.json`."""

    layers: tuple[int, ...]
    positions: tuple[int | str, ...]
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
    partial: str | None = None  # why the stream keeps what no writer writes; None where it does not


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
    # Q is that of all blocks, or of this block alone; "writer": U and V of this module
    subspace: Literal["all", "block", "writer"] = "all"
    strength: float
    experts: tuple[int, ...] | None = None  # those edited of a tensor of several; None for all
    storage: str | None = None  # how the base has it in units of scales, if it does
    # written as plain numbers (BF16) though the base's were quantised; "unpacked" in files of 0.1
    dequantized: bool = Field(False, validation_alias=AliasChoices("dequantized", "unpacked"))
    # |Qᵀ W'| / |Qᵀ W| of the stored bytes; None if W wrote nothing there, and with U and V
    leak: float | None
    change: float | None = None  # |W' - W| / |W|, of a module with U and V of its own
    noise: float | None = None  # of quantised tensors: |W' - E| / |W|, E the exact edit
    noise_nearest: float | None = None  # the same had every number been rounded to its nearest
    sha256_before: str
    sha256_after: str

    @property
    def deviation(self) -> float | None:
        """Distance of the leak from |1 - strength|, what was asked for; None without a leak."""
        return None if self.leak is None else abs(self.leak - abs(1 - self.strength))

    @model_serializer(mode="wrap")
    def _without_change(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `change` where it is not measured: edits.json keeps its bytes."""
        values: dict[str, Any] = plain(self)
        if self.change is None:
            values.pop("change", None)
        return values


class ModelIdentity(Frozen):
    """The base model: a Hub id at a commit, or a local folder with its files' hashes."""

    id: str
    revision: str | None
    n_layers: int
    d_model: int
    model_type: str
    several_streams: bool = False  # whether its blocks hold several residual streams
    license: str | None = None  # its id on the Hub
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    files_sha256: dict[str, str] = {}
    # what a gated base asks of its users: extra_gated_* of its card, whatever YAML that is
    gating: dict[str, Any] = {}


class Tool(Frozen):
    """The version of abliterator that made the record."""

    name: str = "abliterator"
    version: str


class CalibrationSummary(Frozen):
    """Agreement of a judge with human labels, as `abliterator judge-calibrate` measured it."""

    n: int | None = None  # labelled answers
    unscored: int | None = None
    agreement: float | None = None
    kappa: float | None = None  # Cohen's, three classes; None where chance alone agrees
    kappa_binary: float | None = None  # complied against not complied
    labels: str | None = None  # name of the file of labels
    labels_sha256: str | None = None
    sha256: str | None = None  # of the whole calibration


_LOCAL = ("revision", "weights_sha256", "format", "dtype", "is_base", "by_rules")


class JudgeIdentity(Frozen):
    """The judge that gave the verdicts; `calibration` is None where it was not measured."""

    kind: str
    model: str | None = None
    prompt_sha256: str | None = None
    version: str
    calibration: CalibrationSummary | None = None
    base_url: str | None = None
    served_model: str | None = None  # as the server called itself
    fingerprints: tuple[str, ...] = ()
    structured: str | None = None  # how JSON was asked for; a server may accept and ignore it
    votes: int = 1
    disagreement: dict[str, Estimate] = {}  # share of other verdicts: "itself", "rules"
    usage: dict[str, float] = {}  # calls, invalid (replies that were no verdict), usd
    # of a judge in the process of the run
    revision: str | None = None  # its commit on the Hub
    weights_sha256: str | None = None  # digest of the hashes of its files
    format: str | None = None  # how it was asked
    dtype: str | None = None
    is_base: bool = False  # the model that was edited judged the edit
    by_rules: tuple[str, ...] = ()  # grades that its words do not always give: the rule judge's

    @model_serializer(mode="wrap")
    def _dump_local(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what belongs to local judges alone: keys of other judges stay what they were."""
        values: dict[str, Any] = plain(self)
        if self.kind != "local":
            values = {name: value for name, value in values.items() if name not in _LOCAL}
        return values


class EngineIdentity(Frozen):
    """What answered prompts for one side, where it was not transformers in the run's process."""

    kind: str  # as the recipe's `engine.kind`
    software: str | None = None  # as the server states it
    version: str | None = None  # of that software
    dtype: str | None = None  # None where the server states none
    model: str | None = None  # name under which it was served
    base_url: str | None = None
    requests: str | None = None  # whether token ids went in and came back


class PromptOrigin(Frozen):
    """Source of one prompt set, and its size and hash after loading."""

    name: str
    source: str  # Hub dataset id, or file name
    revision: str | None
    split: str | None = None
    n: int
    sha256: str  # of the prompts as used
    read: int | None = None  # prompts in the source; None in records of before it was counted
    asked: int | None = None  # the source's `limit`
    dropped: int = 0  # of those: duplicates, empty rows, and what an evaluation set has too
    overlap: int = 0  # of those dropped, what an evaluation set has too
    near: int | None = None  # of n, near duplicates of an evaluation prompt; None: not compared
    near_dropped: int = 0  # of those dropped, near duplicates of an evaluation prompt
    alike: int | None = None  # of n, near duplicates of an earlier one of the set
    license: str | None = None
    conversations: int = 0  # of n, prompts of several messages or with tools


class Provenance(Frozen):
    """Versions and hardware that the numbers of a build depend on.

    `abliterator build --from` reports which of these differ where a rebuilt bit does.
    """

    created: str  # UTC, ISO 8601
    python: str
    platform: str
    packages: dict[str, str]
    device: str
    dtype: str
    hardware: str | None = None  # what computes: a GPU's name, or a CPU's instruction set
    digests: dict[str, str] = {}  # sha256 of what the weights were made from: moments, directions
    git_commit: str | None = None  # of abliterator, where it was installed from a Git repository
    prompts: tuple[PromptOrigin, ...] = ()
    dropped_overlap: int = 0  # prompts of extraction sets that an evaluation set has too
    near_duplicate: float | None = None  # letter-trigram similarity of what `near` counts
    # it counts prompts of the same words but one, too, where so many are the same; None: it did not
    near_words: int | None = None


class Quotation(Frozen):
    """A result that another source reports on other files; it was not measured here."""

    source: str
    says: str


class RunRecord(Frozen):
    """The complete record of a run: the contract that the card and other tools read."""

    tool: Tool
    recipe: dict[str, Any]  # as `Recipe.published` had it: other versions have other keys
    recipe_digest: str
    model: ModelIdentity
    edit: EditSummary
    behaviour: dict[str, Behaviour | None] = {}
    sampled: SampledAnswers | None = None  # None where the recipe has no `rollouts.samples`
    groups: dict[str, tuple[Grouping, ...]] = {}  # by prompt set, one for each column of groups
    # by prompt set: length, language and agreement of the answers
    side_effects: dict[str, dict[SideEffect, PairedFigure]] = {}
    # by benchmark task: whether the model's own probabilities are how often it is right
    confidence: dict[str, dict[ConfidenceFigure, PairedFigure]] = {}
    engines: dict[str, EngineIdentity] = {}  # by side; empty: transformers, in this process
    divergence: Divergence | None = None
    benchmarks: dict[str, BenchmarkResult] = {}
    judge: JudgeIdentity | None = None
    selection: Selection | None = None
    directions: DirectionChecks | None = None  # where there is something to check
    tuning: Tuning | None = None
    timing: dict[str, float] = {}
    quoted: tuple[Quotation, ...] = ()
    survival: tuple[Survival, ...] = ()  # what quantisation leaves; measured after the build
    pictures: dict[str, str] = {}  # sha256 by path in the checkpoint; the card shows them
    files: dict[
        str, str
    ] = {}  # sha256 of files for other programs, by their path in the checkpoint
    provenance: Provenance

    @model_serializer(mode="wrap")
    def _dump_checks(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `directions` where nothing of them was checked: other records keep their form."""
        values: dict[str, Any] = plain(self)
        if self.directions is None:
            values.pop("directions", None)
        return values
