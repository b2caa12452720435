"""The local judge of a recipe: its files found, its model opened where it is needed, and freed.

It is opened without the edit and with no hooks of a run, also where it is the base itself, and its
own code is never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from abliterator.checkpoint import Checkpoint, fingerprint
from abliterator.devices import release_memory
from abliterator.errors import JudgeError
from abliterator.files import cache_folder, digest_of, read_text
from abliterator.pipeline._options import Options
from abliterator.recipe import JudgeSettings
from abliterator.source import ModelSource, folder_on_disk, resolve_folder

if TYPE_CHECKING:
    from abliterator.engines import Engine
    from abliterator.judge import LocalJudge, Tally

COMMIT = re.compile(r"[0-9a-f]{40}")
_ADAPTER = "adapter_config.json"
_TEMPLATES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")

T = TypeVar("T")


@dataclass(frozen=True)
class JudgeHost:
    """What a local judge needs of the process that it judges in.

    Attributes:
        options: device, dtype and memory.
        base: the recipe's model, which `model: base` means; None outside a recipe.
        trust_remote_code: whether code of the base may run; that of other judges never does.
        make_room: frees what would lie in memory beside the judge, before it is opened.
        keeps: whether the judge stays in memory for later answers, as in a selection; else it is
            freed when all are judged.
        note: called with what a user should know.
    """

    options: Options = field(default_factory=Options)
    base: ModelSource | None = None
    trust_remote_code: bool = False
    make_room: Callable[[], None] = lambda: None
    keeps: bool = False
    note: Callable[[str], None] = lambda _: None


def judge_source(settings: JudgeSettings, base: ModelSource | None) -> ModelSource:
    """The folder of a local judge, downloaded if need be.

    Raises:
        CheckpointError: if there is no such model.
        JudgeError: for `base` without a recipe, and for an adapter.
    """
    if settings.is_base:
        if base is None:
            raise JudgeError(
                "The judge `base` is a recipe's model, and there is no recipe here. Name the "
                "judge: --set judge.model=ID-OR-FOLDER, or give --recipe."
            )
        return base
    resolve = _pinned if settings.revision and COMMIT.fullmatch(settings.revision) else _resolved
    source = resolve(settings.model, settings.revision)
    if (source.folder / _ADAPTER).is_file() and not (source.folder / "config.json").is_file():
        raise JudgeError(
            f"The judge {settings.model} is a LoRA adapter, and whole weights were expected. Merge "
            "it into its base (peft: `AutoPeftModelForCausalLM.from_pretrained(ID)"
            ".merge_and_unload().save_pretrained(FOLDER)`, and its tokenizer), and give that "
            "folder, with `judge.format` where its name does not say it."
        )
    return source


def _resolved(model: str, revision: str | None) -> ModelSource:
    return resolve_folder(model, revision=revision)


_pinned = lru_cache(_resolved)  # a commit stays what it is, and every stage's key names the judge


def judge_on_disk(settings: JudgeSettings, base: Checkpoint) -> Checkpoint | None:
    """A local judge that is on this machine already; None of other judges and where it is not."""
    if settings.kind != "local" or settings.is_base:
        return base if settings.is_base else None
    folder = folder_on_disk(settings.model, revision=settings.revision)
    return None if folder is None else Checkpoint.open(folder)


def local_judge(
    settings: JudgeSettings,
    host: JudgeHost,
    *,
    cache: Path,
    on_verdict: Callable[[Tally], None] | None = None,
) -> LocalJudge:
    """The judge of a recipe's section of `kind: local`; its weights are not loaded yet.

    Args:
        settings: the section.
        host: what it needs of this process.
        cache: file of its log-probabilities.
        on_verdict: called with the tally after each verdict.

    Raises:
        CheckpointError: if there is no such model, or it is no checkpoint.
        JudgeError: if it cannot be a judge.
    """
    from abliterator.judge import JudgeModel, LocalJudge, format_of

    source = judge_source(settings, host.base)
    checkpoint = Checkpoint.open(source.folder)
    dtype = host.options.compute_dtype(checkpoint)
    hashes = fingerprint(checkpoint, cache=cache_folder() / "fingerprint.json")
    is_hub = source.revision is not None or source.id.startswith("embedded:")
    name = source.id if is_hub else Path(source.id).name
    model = JudgeModel(
        name=name,
        revision=source.revision,
        weights=digest_of(hashes),
        dtype=dtype or str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")),
        is_base=settings.is_base,
    )
    return LocalJudge(
        model,
        format_of(name, _templates(source.folder), settings.format),
        use_engine=_using(source.folder, dtype, host, trusted=settings.is_base),
        cache=cache,
        on_verdict=on_verdict,
    )


def _templates(folder: Path) -> str:
    """The files of a folder that may hold a chat template, as one text."""
    return "\n".join(read_text(folder / n) for n in _TEMPLATES if (folder / n).is_file())


def _using(
    folder: Path, dtype: str | None, host: JudgeHost, *, trusted: bool
) -> Callable[[Callable[[Engine], T]], T]:
    """What calls a function with the judge's model, which it opens before and frees afterwards."""
    kept: list[Engine] = []

    def use(function: Callable[[Engine], T]) -> T:
        from abliterator.engines import open_engine

        if kept:
            return function(kept[0])
        host.make_room()
        engine = open_engine(
            folder,
            **host.options.weights,
            dtype=dtype,
            trust_remote_code=trusted and host.trust_remote_code,
            note=host.note,
        )
        if host.keeps:
            kept.append(engine)
        try:
            return function(engine)
        finally:
            del engine
            release_memory()

    return use
