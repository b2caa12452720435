"""Settings of the edit of the weights, and of the selection of what is removed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from abliterator.errors import RecipeError
from abliterator.recipe._section import Layers, Positive, Section, as_tuple

T = TypeVar("T")

Component = Literal[
    "attention",
    "mlp",
    "linear_attention",
    "ssm",
    "convolution",
    "expert",
    "shared_expert",
    "per_layer_input",
]
# Other components inherit the strength of one: what mixes tokens of attention, the rest of mlp.
COMPONENTS: tuple[Component, ...] = ("attention", "mlp")
Strength = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Rungs = Annotated[tuple[Positive, ...], BeforeValidator(as_tuple)]
# yaml reads the key 9 as a number
Blocks = Annotated[str, BeforeValidator(lambda key: str(key) if type(key) is int else key)]
Experts = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), BeforeValidator(as_tuple)
]
_BLOCKS = re.compile("([0-9]{1,4})(?:-([0-9]{1,4}))?")


def blocks_of(key: str) -> range:
    """The blocks that a key of a component's strengths names: "9-24" (both ends), or "9" alone.

    Raises:
        ValueError: for a key that names no block.
    """
    match = _BLOCKS.fullmatch(key)
    blocks = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not blocks:
        raise ValueError(f"names no blocks with {key!r}; write 9-24, or 9")
    return blocks


def ranges_of(by_block: Mapping[int, T]) -> dict[str, T]:
    """Values by range of blocks ("9-24", or "9"), as a recipe has them, from values by block."""
    runs: list[tuple[int, int, T]] = []  # first block, last block, value
    for block, value in sorted(by_block.items(), key=lambda item: item[0]):
        if runs and runs[-1][1:] == (block - 1, value):
            runs[-1] = (runs[-1][0], block, value)
        else:
            runs.append((block, block, value))
    return {f"{a}-{b}" if a < b else f"{a}": value for a, b, value in runs}


def _repeated_block(by_block: Any) -> int | None:
    """The first block that is in two ranges; None without one, or without values by block."""
    ranges = map(blocks_of, by_block if isinstance(by_block, dict) else ())
    counts = Counter(chain.from_iterable(ranges))
    return min((block for block, n in counts.items() if n > 1), default=None)


class Edit(Section):
    """How the writers are edited: the matrices whose output is added to the residual stream."""

    later_keys: ClassVar = ("partial",)

    strength: dict[Component, Strength | dict[Blocks, Strength]] | Literal["auto"] = {
        "attention": 1.0,
        "mlp": 1.0,
    }
    """1 removes, 0 leaves the bytes alone; one number, one per component, or per blocks of one.

    `mlp: {0-8: 0.3, 9-24: 1}` counts blocks as `layers` and tensor names do: layer l enters block
    l, so they are 0 to n_layers - 1, both ends included. Ranges do not overlap; a block in none
    has 0. `auto` finds a strength for every writer (each matrix that adds to the residual stream)
    by gradients (`tuning`).

    `attention` and `mlp` left out are 0. `linear_attention`, `ssm` and `convolution` are as
    `attention`, `expert`, `shared_expert` and `per_layer_input` as `mlp`, unless they are named.
    """
    experts: Literal["all"] | Experts | dict[Blocks, Literal["all"] | Experts] = "all"
    """Which routed experts are edited, at the strength of `expert`: all, or those of these indices.

    `[0, 7]` is those of every block that has experts, `{3-5: [0, 7], 9: all}` those of each block
    named, counted as in `strength`; in a block without a range none are edited. Shared experts and
    all other components follow `strength` alone; `strength: {expert: 1}` leaves them as they are.
    """
    norm: Literal["none", "column"] = "none"
    """`column` rescales the columns of an edited matrix to their old length."""
    embeddings: bool = False
    """Edit the token embedding too; not possible where the output head is tied to it."""
    biases: bool = True
    """Edit the biases of edited matrices too."""
    rounding: Literal["nearest", "compensated"] = "compensated"
    """`compensated` chooses the rounding of each number so that the stored matrix writes nothing
    along the removed directions; `nearest` leaves 2e-3 to 6e-3 of them in bfloat16."""
    quantized: Literal["auto", "keep", "dequantize"] = "auto"
    """How edited tensors that are quantised (FP8, FP4, int4, int8) are stored: `keep` keeps it.

    `dequantize` writes them as bfloat16 (of experts, all tensors of the block's), and config.json
    says which modules are no longer quantised: the checkpoint grows, and the edit is exact up to
    bfloat16. `auto` chooses for each format by measured error: `abliterator plan` shows it.
    """
    output: Literal["checkpoint", "adapter", "both"] = "checkpoint"
    """`adapter` and `both` write the edit as a LoRA for PEFT too, to OUT/adapter.

    The checkpoint is always made, since it is what is measured; so the two mean the same.
    """
    partial: bool = False
    """Edit a model whose own blocks bring the removed directions back into the stream.

    Gemma 3n, MiniMax-01 and a few others hand on copies of the stream that they rescale. What is
    written is edited exactly; what these copies carry remains, and plan, card and `verify` say so.
    Without it such a model is refused, with it every other one.
    """

    @field_validator("strength", mode="before")
    @classmethod
    def _strength_per_component(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return dict.fromkeys(COMPONENTS, float(value))
        return value

    @field_validator("strength")
    @classmethod
    def _each_block_once(cls, value: Any) -> Any:
        for component, strength in value.items() if isinstance(value, dict) else ():
            block = _repeated_block(strength)
            if block is not None:
                raise ValueError(f"gives `{component}` two strengths in block {block}")
        return value

    @field_validator("experts")
    @classmethod
    def _each_expert_once(cls, value: Any) -> Any:
        block = _repeated_block(value)
        if block is not None:
            raise ValueError(f"names block {block} twice")
        for indices in value.values() if isinstance(value, dict) else [value]:
            if len(set(indices)) < len(indices) and indices != "all":
                raise ValueError(f"names an expert twice in {list(indices)}")
        return value

    @property
    def strengths(self) -> dict[Component, float | dict[str, float]]:
        """Strength of each component; with `auto`, those that tuning starts from."""
        return dict.fromkeys(COMPONENTS, 1.0) if self.strength == "auto" else self.strength

    def strengths_in(self, n_layers: int) -> dict[str, float | tuple[float, ...]]:
        """Strength of each component in a model: one number, or one for every block.

        A block in no range has 0.

        Raises:
            RecipeError: for a range beyond the last block.
        """
        resolved: dict[str, float | tuple[float, ...]] = {}
        for component, strength in self.strengths.items():
            if not isinstance(strength, dict):
                resolved[str(component)] = strength
                continue
            by_block = _expand_ranges(strength, f"edit.strength.{component}", n_layers)
            resolved[str(component)] = tuple(by_block.get(i, 0.0) for i in range(n_layers))
        return resolved

    def experts_in(
        self, n_layers: int
    ) -> tuple[int, ...] | dict[int, tuple[int, ...] | None] | None:
        """Edited experts in a model: those of every block, or by block; None stands for all.

        Raises:
            RecipeError: for a range beyond the last block.
        """
        if not isinstance(self.experts, dict):
            return None if self.experts == "all" else self.experts
        by_block = _expand_ranges(self.experts, "edit.experts", n_layers)
        return {block: None if experts == "all" else experts for block, experts in by_block.items()}

    @property
    def adapts(self) -> bool:
        """Whether an adapter is written beside the checkpoint."""
        return self.output != "checkpoint"

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        values = [s.values() if isinstance(s, dict) else [s] for s in self.strengths.values()]
        if not any(map(any, values)) and not self.embeddings:
            raise ValueError("every strength is 0: nothing would be edited")
        return self


def _expand_ranges(by_range: Mapping[str, T], where: str, n_layers: int) -> dict[int, T]:
    """Values by block, from values by range of blocks; RecipeError beyond the last block."""
    by_block = {}
    for key, value in by_range.items():
        for block in blocks_of(key):
            if block >= n_layers:
                raise RecipeError(
                    f"`{where}.{key}` names block {block}, but the model has blocks 0 to "
                    f"{n_layers - 1} (layer l of `layers` enters block l)."
                )
            by_block[block] = value
    return by_block


class Selection(Section):
    """How layers and k are chosen, for `layers: sweep` and `k: auto`."""

    max_kl: Annotated[float, Field(gt=0)] = 0.1
    """Gate: the largest KL divergence on neutral prompts, in nats per token, that a candidate may
    cause."""
    min_induce: float = 0.0
    """Gate: the least rise of the log-odds of a refusal when a candidate's direction is added."""
    skip_last: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Gate: share of the layers, counted from the last, that are not candidates."""
    scored: Positive = 16
    """Prompts of each kind on which every candidate is scored before any of them answers."""
    prompts: Positive = 32
    """Prompts of each kind that are held out, for answers and for the divergence."""
    tokens: Positive = 48
    """Tokens of a judged answer, at most."""
    judge: Literal["rules", "recipe"] = "rules"
    """Which judge grades these answers, and those of tuned edits: the rule judge, which costs
    nothing, or the recipe's `judge`."""
    survivors: Positive = 8
    """Number of candidates whose answers are judged; the largest stack if that is more."""
    rungs: Rungs = (8, 16)
    """Prompts that survivors answer before the worst of them drop out; the last rung has `prompts`.

    With `[]` all survivors answer all prompts. No answer is generated twice. Tuned edits are judged
    so too; of them, only those drop out that another beats in KL and, by more than the noise of so
    few prompts, in compliance x coherence.
    """
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the survivors that goes on to the next rung."""
    batch_size: Positive | Literal["auto"] = 64
    """Rows in one forward pass; rows of several candidates share a batch.

    `auto`: as `rollouts.batch_size`.
    """
    stacks: Layers = (1, 2, 3, 5)
    """Sizes that `k: auto` tries; it stops at the first that is no better than the one before."""
    controls: Positive = 3
    """Draws of random directions, and of shuffled labels, whose mean each size must beat."""

    @field_validator("stacks")
    @classmethod
    def _growing(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value[:1] != (1,) or list(value) != sorted(set(value)):
            raise ValueError("must begin with 1 and grow")
        return value

    @field_validator("rungs")
    @classmethod
    def _growing_rungs(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("must grow")
        return value

    @property
    def rows(self) -> int | None:
        """`batch_size` as a number; None for the engine's choice."""
        return None if self.batch_size == "auto" else self.batch_size

    def schedule(self, candidates: int, prompts: int, least: int) -> list[tuple[int, int]]:
        """Candidates and prompts of each rung, the last with all prompts.

        Args:
            candidates: that are to be judged.
            prompts: that there are.
            least: candidates that must reach the last rung, if there are as many.
        """
        rungs = []
        for rung in (*(n for n in self.rungs if n < prompts), prompts):
            rungs.append((candidates, rung))
            # 1e-9: a half of 8 is 4, whatever 8 x .5 is in binary
            candidates = min(candidates, max(math.ceil(candidates * self.keep - 1e-9), least, 1))
        return rungs

    def candidates(self, n_layers: int) -> range:
        """The layers that a sweep tries."""
        # 1e-9: 10 layers less a fifth are 8, whatever 10 x (1 - .2) is in binary
        return range(1, max(1, int(n_layers * (1 - self.skip_last) + 1e-9)) + 1)
