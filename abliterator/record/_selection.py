"""Results of a selection of layers and k: an entry of the record, and work/sweep.json."""

from __future__ import annotations

from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from abliterator.record._measured import Estimate, Frozen


class _OfNodes(Frozen):
    """A result that may be of nodes of a self-organising map; others are written without them."""

    @model_serializer(mode="wrap")
    def _dump_nodes(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        return {k: v for k, v in values.items() if v or k not in ("node", "nodes") or v == 0}


class AnswerSummary(Frozen):
    """Judged answers to held-out target prompts; None where over 2 % have no verdict."""

    refusal: Estimate | None
    compliance: Estimate | None
    coherence: Estimate | None
    product: Estimate | None  # mean of compliance x coherence, per prompt
    tokens: int  # generated, all answers together


class Rung(Frozen):
    """A candidate's result on the first prompts of the successive halving."""

    prompts: int
    product: Estimate | None


class Candidate(_OfNodes):
    """One direction: scores without answers, the gates that stopped it, and answers if judged.

    `bypass` is the mean log-odds of a refusing opening on target prompts under the edit (lower is
    better), `kl` that of the next-token distributions along the base's answers to neutral prompts
    (nats, per token), `induce` the rise of the log-odds on contrast prompts when the direction is
    added at its layer. `answers` are to the prompts of the last of its `rungs`.
    """

    layer: int
    position: int | str = -1
    node: int | None = None  # of the layer's self-organising map, where that is the candidate
    bypass: float
    kl: float
    induce: float
    stopped_by: tuple[str, ...] = ()
    answers: AnswerSummary | None = None
    rungs: tuple[Rung, ...] = ()

    @property
    def name(self) -> str:
        """The layer, and its node where that is the candidate."""
        return f"{self.layer}" if self.node is None else f"{self.layer} node {self.node}"


class Stack(_OfNodes):
    """k directions together, compared with fewer and with as many control directions.

    Controls are means over `draws` of them. KL is that of neutral answers, in nats: a control with
    a large one has broken the model.
    """

    k: int
    layers: tuple[int, ...]
    positions: tuple[int | str, ...] = ()
    nodes: tuple[int, ...] = ()
    kl: float
    answers: AnswerSummary
    draws: int = 1
    random: AnswerSummary  # the same number of random directions
    random_kl: float | None = None
    shuffled: AnswerSummary | None = None  # the same number of directions from shuffled labels
    shuffled_kl: float | None = None
    over_random: Estimate | None  # paired difference of the products
    over_shuffled: Estimate | None = None
    over_smaller: Estimate | None = None

    def broken(self, control_kl: float | None, max_kl: float) -> bool:
        """Whether a control moved neutral answers further than this stack does, and than it may."""
        return control_kl is not None and control_kl > max(max_kl, self.kl)


class Structure(Frozen):
    """Cosines and effective rank of the candidates' directions."""

    layers: tuple[int, ...]
    position: int | str = -1  # of the directions whose cosines these are
    cosines: tuple[tuple[float, ...], ...]
    participation_ratio: float  # of the layers that were judged, or given
    verdict: str  # "single direction" or "low-rank subspace"
    because: str


class SelectionBase(Frozen):
    """The base on the same prompts."""

    bypass: float
    answers: AnswerSummary


class Selection(_OfNodes):
    """The layers and k that a selection chose, with the measurements behind them."""

    layers: tuple[int, ...]  # in order of preference
    positions: tuple[int | str, ...]  # of each of them
    nodes: tuple[int, ...] = ()  # of each of them, where nodes of one layer were chosen from
    k: int
    why: str
    base: SelectionBase
    candidates: tuple[Candidate, ...] = ()
    stacks: tuple[Stack, ...] = ()
    structure: Structure
    rollout_tokens: int  # all that was generated
