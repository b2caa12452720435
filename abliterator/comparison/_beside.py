"""Differences of two checkpoints beside their weights, and a folder that prompts both alike.

Compared is what a file does, not its bytes: a chat template may come from four files, and a config
may leave out what is the default. What changes neither an answer nor a logit is left out: names,
versions, dtypes of storage, settings of training.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.checkpoint import Checkpoint, auxiliary_files, is_legal, is_opened_by_loaders
from abliterator.errors import AbliteratorError
from abliterator.files import copy_file, read_text, sha256_of_file, shown, write_text_atomic
from abliterator.formats import storage_of
from abliterator.record import Difference, Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATES = "additional_chat_templates"
_TEMPLATES = re.compile(r"(additional_chat_templates/.*|.*\.jinja|chat_template.*\.json)")
_CODE = re.compile(r".*\.(py|cpp|cu|h)")
_NOT_OF_TEXT = re.compile(
    r"(config\.json|generation_config.*|hf_quant_config.*|.*\.index\.json|.*processor.*\.json)"
)
# Fields that no loader computes with, and those that are compared separately: stop tokens, code.
_IGNORED = re.compile(
    r"(.*\.)?(_.*|abliterator|.*version|(torch_)?dtype|(bos|eos|pad|sep|decoder_start)_token_id"
    r"|auto_map|use_cache|return_dict(_in_generate)?|torchscript|gradient_checkpointing"
    r"|output_(attentions|hidden_states|router_logits|scores)|id2label|label2id|num_labels"
    r"|problem_type|finetuning_task|task_specific_params|tokenizer_class|initializer_factor"
    r"|\w*(dropout|_pdrop|initializer_range|layerdrop|aux_loss_coef|jitter_noise))(\..*)?"
)
_QUANTIZATION = ("quantization_config", "compression_config")
# Parts of a fast tokenizer that decide how text becomes tokens, and tokens text.
_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_SETTINGS = ("bos_token", "eos_token", "unk_token", "clean_up_tokenization_spaces")
_EXCERPT = 40  # characters of a text before and after the first that differs

Texts = tuple[str | None, str | None]  # of base and edited; None where one has none


@dataclass(frozen=True)
class Setup:
    """All of a checkpoint but its weights."""

    checkpoint: Checkpoint

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.checkpoint.folder

    @cached_property
    def files(self) -> dict[str, str]:
        """SHA-256 of the files that a loader may open, by relative path."""
        return {
            name: sha256_of_file(self.folder / name) for name in auxiliary_files(self.folder)[0]
        }

    def files_of(self, part: Part) -> dict[str, str]:
        """The entries of `files` that belong to one part: chat template, tokenizer or code."""
        return {name: digest for name, digest in self.files.items() if _part(name) == part}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer; None where it cannot be loaded without running code of the folder."""
        from abliterator.model import load_tokenizer

        try:
            return load_tokenizer(self.folder)
        except Exception:  # noqa: BLE001  whatever the files of a folder make libraries raise
            return None

    @cached_property
    def loaded_config(self) -> dict[str, Any] | None:
        """The config with its type's defaults; None where it is not of transformers' own types."""
        from transformers import AutoConfig

        try:
            config: dict[str, Any] = AutoConfig.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            ).to_dict()
        except Exception:  # noqa: BLE001  whatever the files of a folder make libraries raise
            return None
        return config

    def config(self, *, loaded: bool) -> dict[str, Any]:
        """The fields of the config by dotted name; `loaded` with defaults filled in."""
        config = (self.loaded_config if loaded else None) or self.checkpoint.config
        decoded = _QUANTIZATION if self._quantization_is_decoded else ()
        return {
            name: value
            for name, value in _flat(config)
            if not _IGNORED.fullmatch(name) and name.split(".")[0] not in decoded
        }

    @cached_property
    def generation(self) -> dict[str, Any]:
        """The fields of generation_config.json, but for stop tokens and versions."""
        fields = _flat(self._json(GENERATION_CONFIG))
        return {name: value for name, value in fields if not _IGNORED.fullmatch(name)}

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: of generation_config, config and tokenizer together."""
        config = self.loaded_config or self.checkpoint.config
        nested = [config, *(part for part in config.values() if isinstance(part, dict))]
        declared = [part.get("eos_token_id") for part in (self._json(GENERATION_CONFIG), *nested)]
        declared.append(getattr(self.tokenizer, "eos_token_id", None))
        ids = chain(*(value if isinstance(value, list) else [value] for value in declared))
        return tuple(sorted({i for i in ids if isinstance(i, int)}))

    @cached_property
    def templates(self) -> dict[str, str]:
        """Chat templates by name, "default" is the one that prompts are rendered with."""
        value = getattr(self.tokenizer, "chat_template", None) or {}
        templates = dict(value) if isinstance(value, dict) else {"default": str(value)}
        if not templates:  # older processors have it in a file that tokenizers do not read
            text = self._json("chat_template.json").get("chat_template")
            templates = {"default": text} if isinstance(text, str) else {}
        return templates

    @property
    def logits(self) -> object:
        """Size of the vocabulary that the model predicts over, from its config."""
        config = self.loaded_config or self.checkpoint.config
        inner = config.get("text_config")
        return (inner if isinstance(inner, dict) else config).get("vocab_size")

    @property
    def _quantization_is_decoded(self) -> bool:
        try:
            storage_of(self.checkpoint.config)
        except AbliteratorError:
            return False
        return True

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            return {}
        try:
            value = json.loads(read_text(self.folder / name))
        except (AbliteratorError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}


def differences(base: Setup, edited: Setup) -> tuple[Difference, ...]:
    """All differences beside the weights that change rendered prompts, answers or computation."""
    return (
        *_templates(base, edited),
        *_tokenizers(base, edited),
        *_changes("stop_tokens", {"ids": base.stop_ids}, {"ids": edited.stop_ids}, _as_texts),
        *_changes("generation_config", base.generation, edited.generation, _json_texts),
        *_changes("config", *_configs(base, edited), _json_texts),
        *_files("code", base, edited),
    )


def compute_alike(base: Setup, edited: Setup) -> bool:
    """Whether models of these configs and of this code compute the same with the same weights."""
    before, after = _configs(base, edited)
    return before == after and base.files_of("code") == edited.files_of("code")


def _configs(base: Setup, edited: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both configs with defaults filled in, or, where one cannot be loaded, both without."""
    loaded = base.loaded_config is not None and edited.loaded_config is not None
    return base.config(loaded=loaded), edited.config(loaded=loaded)


def differences_beside(base: Path, edited: Path) -> tuple[Difference, ...]:
    """All that differs beside the weights of two checkpoint folders.

    Raises:
        CheckpointError: if a folder is no sound checkpoint.
    """
    return differences(Setup(Checkpoint.open(base)), Setup(Checkpoint.open(edited)))


def same_vocabulary(base: Setup, edited: Setup) -> bool:
    """Whether every token of the base has the same id in the edited model.

    Then the base's token ids mean the same text to both, whatever else their tokenizers do.
    """
    if base.files_of("tokenizer") == edited.files_of("tokenizer"):
        return True
    if base.tokenizer is None or edited.tokenizer is None:
        return False
    return bool(base.tokenizer.get_vocab().items() <= edited.tokenizer.get_vocab().items())


def link_with_base_prompting(base: Setup, edited: Setup, folder: Path) -> Path:
    """Makes a folder with the edited model and the base's template, tokenizer and stop tokens.

    Weights are linked; what else a loader opens is copied.
    """
    folder.mkdir()
    for setup in (edited, base):
        for path in sorted(setup.folder.iterdir()):
            if _affects_prompting(path.name) == (setup is base):
                _link_or_copy(path, folder)
    if not (folder / GENERATION_CONFIG).exists():  # else the edited config would say where to stop
        settings = {"eos_token_id": list(base.stop_ids)}
        write_text_atomic(folder / GENERATION_CONFIG, json.dumps(settings))
    return folder


def _link_or_copy(path: Path, folder: Path) -> None:
    target = folder / path.name
    if path.suffix == ".safetensors":
        target.symlink_to(path.resolve())
    elif path.name == CHAT_TEMPLATES:
        shutil.copytree(path, target)
    elif path.is_file() and is_opened_by_loaders(path.name):
        copy_file(path, target)


def _affects_prompting(name: str) -> bool:
    """Whether a file or folder of this name affects rendered prompts or where answers stop."""
    if name in (GENERATION_CONFIG, CHAT_TEMPLATES):
        return True
    opened = is_opened_by_loaders(name) and not name.endswith(".safetensors")
    return opened and _part(name) in ("chat_template", "tokenizer")


def _part(file: str) -> Part | None:
    if _TEMPLATES.fullmatch(file):
        return "chat_template"
    if _CODE.fullmatch(file):
        return "code"
    return None if _NOT_OF_TEXT.fullmatch(file) or is_legal(file) else "tokenizer"


def _templates(base: Setup, edited: Setup) -> Iterator[Difference]:
    parts: tuple[Part, ...] = ("chat_template", "tokenizer")  # tokenizer_config.json may hold one
    if all(base.files_of(part) == edited.files_of(part) for part in parts):
        return
    if base.tokenizer is None or edited.tokenizer is None:
        yield from _files("chat_template", base, edited)
    else:
        yield from _changes("chat_template", base.templates, edited.templates, _excerpts)


def _tokenizers(base: Setup, edited: Setup) -> Iterator[Difference]:
    if base.files_of("tokenizer") == edited.files_of("tokenizer"):
        return
    if base.tokenizer is None or edited.tokenizer is None:
        yield from _files("tokenizer", base, edited)
        return
    yield from _vocabularies(base.tokenizer.get_vocab(), edited.tokenizer.get_vocab())
    before, after = _behaviour(base.tokenizer), _behaviour(edited.tokenizer)
    if before is None or after is None:
        yield from _files("tokenizer", base, edited)
    else:
        yield from _changes(
            "tokenizer",
            before,
            after,
            lambda *sides: _excerpts(*(json.dumps(side, ensure_ascii=False) for side in sides)),
        )


def _vocabularies(base: Mapping[str, int], edited: Mapping[str, int]) -> Iterator[Difference]:
    """Number of tokens that have another id or are on one side only, with the first of them."""
    changed = {token for token in base.keys() & edited.keys() if base[token] != edited[token]}
    for name, tokens in (
        ("tokens with another id", changed),
        ("tokens of the base alone", base.keys() - edited.keys()),
        ("tokens of the edited alone", edited.keys() - base.keys()),
    ):
        if tokens:
            first = min(tokens, key=lambda token: (base.get(token, edited.get(token)), token))
            yield Difference(
                part="tokenizer",
                name=f"{len(tokens)} {name}, such as {shown(first)}",
                base=f"id {base[first]}" if first in base else None,
                edited=f"id {edited[first]}" if first in edited else None,
            )


def _behaviour(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The tokenizer's settings that encoding and decoding depend on, without the vocabulary.

    None for a tokenizer that is not built on `tokenizers`; its files are compared instead.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or not hasattr(fast, "to_str"):
        return None
    settings = json.loads(fast.to_str())
    model = {f"model.{name}": value for name, value in settings["model"].items() if name != "vocab"}
    return {
        **{name: str(getattr(tokenizer, name, None)) for name in _SETTINGS},
        **model,
        **{name: settings.get(name) for name in _SECTIONS},
        "added_tokens": sorted(settings.get("added_tokens") or [], key=lambda token: token["id"]),
    }


def _files(part: Part, base: Setup, edited: Setup) -> Iterator[Difference]:
    def digests(*sides: str | None) -> Texts:
        before, after = (side and f"sha256 {side[:12]}" for side in sides)
        return before, after

    return _changes(part, base.files_of(part), edited.files_of(part), digests)


def _changes(
    part: Part,
    base: Mapping[str, Any],
    edited: Mapping[str, Any],
    texts: Callable[[Any, Any], Texts],
) -> Iterator[Difference]:
    """What differs between two mappings; `texts` of both sides are shortened to fit on a line."""
    for name in sorted(base.keys() | edited.keys()):
        before, after = base.get(name), edited.get(name)
        if before != after:
            sides = (None if text is None else shown(text) for text in texts(before, after))
            yield Difference(part=part, name=shown(name), base=next(sides), edited=next(sides))


def _as_texts(base: object, edited: object) -> Texts:
    return str(base), str(edited)


def _json_texts(base: Any, edited: Any) -> Texts:
    """Both values as JSON; None where a side has none."""
    before, after = (
        None if value is None else json.dumps(value, ensure_ascii=False, default=str)
        for value in (base, edited)
    )
    return before, after


def _excerpts(base: str | None, edited: str | None) -> Texts:
    """The two texts around the first character that differs."""
    if base is None or edited is None:
        return base, edited
    pairs = zip(base, edited, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    start = max(0, same - _EXCERPT)
    cut = slice(start, same + _EXCERPT)
    return ("…" if start else "") + base[cut], ("…" if start else "") + edited[cut]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a config, nested ones by dotted names; fields that are None are left out."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value
