"""The engine that a model gets on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.devices import AUTO
from abliterator.engines._streamed import StreamedEngine, open_streamed
from abliterator.engines._transformers import TransformersEngine
from abliterator.errors import UnsupportedModel
from abliterator.model import LoadedModel, load_model, needs_disk, placement_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_engine(
    folder: Path,
    *,
    device: str,
    dtype: str | None,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scratch: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> TransformersEngine | StreamedEngine:
    """An engine of the model in `folder`: streamed where its weights would lie on disk.

    With `device` "auto" only; a model that has to be loaded whole is placed in memory and on disk,
    and so is one whose answers are asked for.

    Args:
        folder: a checkpoint in safetensors format.
        device: as `load_model` takes it; further arguments and errors are those of `load_model`.
        dtype: of computation.
        max_memory: bytes of weights on each accelerator and in host memory at most.
        trust_remote_code: whether Python files in `folder` may run.
        tokenizer: instead of the model's own.
        scratch: folder for hidden states that exceed the memory; None is the system's.
        note: called with what a user should know of the choice.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    placing = {**options, "device": device, "max_memory": max_memory}
    changes = {} if tokenizer is None else {"tokenizer": tokenizer}

    def load() -> LoadedModel:
        return replace(load_model(folder, **placing), **changes)

    if device != AUTO or not needs_disk(placement_of(folder, **placing)):
        return TransformersEngine(load())

    try:
        engine = open_streamed(
            folder,
            device=device,
            place=_noting_first(load, note, folder.name),
            activation_bytes=max_memory,
            scratch=scratch,
            **options,
        )
    except UnsupportedModel as error:
        note(f"{folder.name} is larger than the memory, and placed in memory and on disk. {error}")
        return TransformersEngine(load())
    note(
        f"{folder.name} is larger than the memory: its weights are read block by block, once for "
        "all prompts of a pass."
    )
    loaded = replace(engine.streamed.loaded, **changes)
    return replace(engine, streamed=TransformersEngine(loaded))


def _noting_first(
    load: Callable[[], LoadedModel], note: Callable[[str], None], name: str
) -> Callable[[], LoadedModel]:
    """`load`, which before its first call notes that the model will answer slowly."""

    @cache
    def note_placement() -> None:
        note(
            f"{name} is larger than the memory, and answers need all of it for every token: "
            "its weights are placed in memory and on disk for them, which is slow. A model server "
            "answers faster (`engine:` in the recipe)."
        )

    def place() -> LoadedModel:
        note_placement()
        return load()

    return place
