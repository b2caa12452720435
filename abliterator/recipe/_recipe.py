"""The recipe as a frozen model without further keys, with one docstring per field."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from abliterator.files import digest_of
from abliterator.recipe._benchmarks import Benchmarks, DivergenceSettings, without_folder
from abliterator.recipe._directions import DirectionSettings
from abliterator.recipe._edit import Edit, Selection
from abliterator.recipe._engine import EngineSettings
from abliterator.recipe._judge import JudgeSettings, Rollouts
from abliterator.recipe._prompts import Capture, Chat, Prompts
from abliterator.recipe._publish import Publish
from abliterator.recipe._section import Layers, Positive, Section
from abliterator.recipe._tuning import Tuning


class Recipe(Section):
    """A whole recipe. Every key but `model`, `layers` and `k` has a default."""

    model: Annotated[str, Field(min_length=1)]
    """Hub id, local folder, or `embedded:demo`."""
    layers: Layers | Literal["sweep"]
    """Residual layers (1 .. n_layers) in order of preference; the first k are stacked.

    `sweep` finds them by measurement (`selection`).
    """
    k: Positive | Literal["auto"]
    """Rank of the subspace; `auto` finds it by measurement (`selection`)."""
    revision: str | None = None
    """Commit of the model. Default: the build resolves it once and records it."""
    trust_remote_code: bool = False
    """Run the model's own code; for a Hub model only at a pinned revision."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of splits and intervals."""
    engine: EngineSettings = EngineSettings()
    chat: Chat = Chat()
    prompts: Prompts = Prompts()
    capture: Capture = Capture()
    directions: DirectionSettings = DirectionSettings()
    selection: Selection = Selection()
    edit: Edit = Edit()
    tuning: Tuning = Tuning()
    rollouts: Rollouts = Rollouts()
    judge: JudgeSettings = JudgeSettings()
    divergence: DivergenceSettings = DivergenceSettings()
    benchmarks: Benchmarks = Benchmarks(tasks=())
    publish: Publish = Publish()

    @field_validator("layers", mode="before")
    @classmethod
    def _a_list(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            raise ValueError(f"must be a list: write `[{value}]`")
        return value

    @field_validator("layers")
    @classmethod
    def _distinct_layers(cls, value: Any) -> Any:
        if value == ():
            raise ValueError("no layer is given")
        if isinstance(value, tuple) and len(set(value)) < len(value):
            raise ValueError("a layer is given twice")
        return value

    @model_validator(mode="after")
    def _enough_layers(self) -> Self:
        if self.directions.stack == "per_layer":
            if self.selects or self.k != 1:
                raise ValueError(
                    "`stack: per_layer` leaves nothing to a sweep: name `layers`, a position, and "
                    "`k: 1`"
                )
        elif self.directions.stack == "within_layer":
            if self.prompts.contrast is None:
                raise ValueError("`stack: within_layer` needs pairs: give `prompts.contrast`")
            if self.prompts.protect:
                raise ValueError(
                    "`stack: within_layer` takes paired differences as they are: leave out "
                    "`prompts.protect`"
                )
        elif self.directions.stack == "som":
            nodes = math.prod(self.directions.grid)
            if isinstance(self.k, int) and self.k > nodes:
                raise ValueError(f"k is {self.k}, but `directions.grid` has {nodes} nodes")
        elif (
            isinstance(self.layers, tuple) and isinstance(self.k, int) and self.k > len(self.layers)
        ):
            raise ValueError(
                f"k is {self.k}, but only {len(self.layers)} layers are given. Name more layers, "
                "or lower k"
            )
        return self

    @model_validator(mode="after")
    def _several_in_sequence(self) -> Self:
        if self.directions.stack != "sequential":
            return self
        if self.selects or self.k == 1:
            raise ValueError(
                "`stack: sequential` removes the directions of named layers one after the other: "
                "name `layers`, one position, and a k of 2 or more"
            )
        if self.edit.strength == "auto":
            raise ValueError(
                "`stack: sequential` is not tuned: give `edit.strength`, or stack `layers`"
            )
        return self

    @model_validator(mode="after")
    def _pairs_that_can_be_tuned(self) -> Self:
        if self.directions.by_writer and self.edit.norm != "none":
            raise ValueError(
                f"`stack: {self.directions.stack}` edits W' = W - U Vᵀ W, and "
                f"`edit.norm: {self.edit.norm}` scales the columns of that: leave `norm: none`"
            )
        if self.tuning.sets_pairs and self.directions.stack != "per_writer":
            raise ValueError(
                "`tuning.ridge` and `tuning.max_change` belong to `directions.stack: per_writer`"
            )
        return self

    @model_validator(mode="after")
    def _one_direction_that_induces(self) -> Self:
        of = self.directions
        has_one = self.k == 1 and of.stack in ("layers", "per_layer")
        if self.tuning.induce and not (has_one and of.estimator == "tuned"):
            raise ValueError(
                "`tuning.induce` tunes one direction that is added at its layer: set `k: 1`, "
                "`directions.estimator: tuned`, and `stack: layers` or `per_layer`"
            )
        return self

    @model_serializer(mode="wrap")
    def _dump_named_engine(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the default `engine`: recipes of before it was a section keep their digests."""
        values: dict[str, Any] = plain(self)
        if values.get("engine") == {"kind": "transformers"}:
            del values["engine"]
        return values

    def published(self) -> dict[str, Any]:
        """The recipe as plain values in which local paths are reduced to their last part.

        Shown by cards and published folders; it does not depend on where files are stored.
        """
        plain = self.model_dump(mode="json")
        if self.publish == Publish():
            del plain["publish"]  # recipes of before have no such section, and the same digest
        if Path(self.model).is_absolute():
            plain["model"] = Path(self.model).name
        sources = dict(plain["prompts"])
        protected = sources.pop("protect", {})  # any of its sets may be called `path`
        for source in (*sources.values(), *protected.values()):
            if isinstance(source, dict) and source["path"] is not None:
                source["path"] = Path(source["path"]).name
        if "calibration" in plain["judge"]:
            plain["judge"]["calibration"] = Path(plain["judge"]["calibration"]).name
        if self.judge.kind == "local" and Path(self.judge.model).is_absolute():
            plain["judge"]["model"] = Path(self.judge.model).name
        if "engine" in plain:
            plain["engine"] = self.engine.published()
        tasks = plain["benchmarks"]["tasks"]
        plain["benchmarks"]["tasks"] = [without_folder(task) for task in tasks]
        return plain

    @property
    def selects(self) -> bool:
        """Whether layers, positions or k are to be chosen by measurement."""
        return self.sweeps or self.k == "auto"

    @property
    def sweeps(self) -> bool:
        """Whether layers or positions are to be chosen by measurement."""
        return self.layers == "sweep" or self.directions.sweeps_positions

    @property
    def sweeps_nodes(self) -> bool:
        """Whether the nodes of a self-organising map are to be chosen by measurement."""
        return self.directions.stack == "som" and self.k == "auto" and not self.sweeps

    @property
    def needs_neutral_mean(self) -> bool:
        """Whether directions depend on the mean activation of neutral prompts."""
        return self.directions.projection == "neutral" or bool(self.prompts.protect)

    @property
    def tunes(self) -> bool:
        """Whether strengths or directions are tuned by gradients."""
        return self.edit.strength == "auto" or self.directions.estimator == "tuned"

    @property
    def digest(self) -> str:
        """sha256 as canonical JSON of the published form, without what it requires of that."""
        plain = self.published()
        plain.pop("publish", None)
        return digest_of(plain)
