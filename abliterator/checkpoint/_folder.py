"""A checkpoint folder: the files that hold its weights, and every tensor in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from abliterator.anatomy import anatomy_of
from abliterator.checkpoint._header import (
    MAX_JSON_BYTES,
    TensorInfo,
    encodable,
    parse_json_object,
    read_exactly,
    read_header,
)
from abliterator.errors import AbliteratorError, CheckpointError
from abliterator.files import (
    damaged,
    open_regular,
    readable,
    require_plain_folder,
    require_utf8_name,
    shown,
)

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
INDEX_FILE = "model.safetensors.index.json"
_HEADS = ("lm_head.weight", "embed_out.weight")  # GPT-NeoX's is called embed_out
_CONVERT = (
    "Convert it once, where you trust its author: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and the same for "
    "its tokenizer."
)


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint folder, made by `open`; of the weights, only the headers are read.

    Attributes:
        folder: The folder.
        config: `config.json`, parsed.
        tensors: Every tensor by name; files in the order of `weight_files`, tensors in the order of
            their bytes.
        file_bytes: Size of each weight file in bytes, by its path relative to the folder.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    file_bytes: Mapping[str, int]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as it was read: the read-only mappings of `open` cannot be."""
        return Checkpoint, (self.folder, self.config, dict(self.tensors), dict(self.file_bytes))

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open and check a folder that transformers could load; reads headers only.

        Raises:
            CheckpointError: the folder is not a checkpoint, is damaged, or has its weights in
                another format.
            FileError: something in it is no plain file (`require_plain_folder`).
        """
        require_utf8_name(folder)
        config = _read_config(folder)
        tensors: dict[str, TensorInfo] = {}
        file_bytes = {}
        for file, expected in locate_weights(folder).items():
            infos, file_bytes[file] = read_header(folder, file)
            if expected is not None:
                named = {info.name for info in infos}
                _check_against_index(folder, file, named, expected, config)
            tensors.update((info.name, info) for info in infos)
        if not tensors:
            raise damaged(folder, "there is no tensor in its weight files")
        return cls(folder, config, MappingProxyType(tensors), MappingProxyType(file_bytes))

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Paths of the weight files relative to the folder, sorted."""
        return tuple(self.file_bytes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name, in the order of `tensors`."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def total_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(self.file_bytes.values())

    def read(self, name: str) -> bytes:
        """The stored bytes of one tensor."""
        info = self.tensors[name]
        with open_regular(self.folder / info.file) as source:
            source.stream.seek(info.start)
            return read_exactly(source, info.nbytes)


def locate_weights(folder: Path) -> dict[str, frozenset[str] | None]:
    """The weight files transformers would load, each with the tensors an index expects in it.

    As in transformers, `model.safetensors` goes before the index; it stands with None.
    """
    with readable(folder):
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if single.exists() or single.is_symlink():
            return {SINGLE_FILE: None}
        if not index.exists():
            raise CheckpointError(_no_safetensors(folder))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, "it has no weight_map that says which file holds which tensor")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        _check_shard_name(index, file)
        shards.setdefault(file, set()).add(name)
    return {file: frozenset(shards[file]) for file in sorted(shards)}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object."""
    with open_regular(path) as source:
        if source.size > MAX_JSON_BYTES:
            raise damaged(path, f"it has {source.size} bytes; {MAX_JSON_BYTES} are allowed")
        text = source.stream.readall()
    return parse_json_object(text, path, what="the file")


def _read_config(folder: Path) -> dict[str, Any]:
    with readable(folder):
        if not folder.is_dir():
            fault = "is not a folder" if folder.exists() else "does not exist"
            raise CheckpointError(
                f"{folder} {fault}; a checkpoint folder with config.json, weights and tokenizer "
                "was expected. Check the path, or give the model's id on the Hugging Face Hub."
            )
        if not (folder / CONFIG_FILE).exists():
            raise CheckpointError(
                f"{folder} has no config.json; a checkpoint folder as save_pretrained writes it "
                "was expected. Give the folder that holds the model's config.json, weights and "
                "tokenizer."
            )
    require_plain_folder(folder)
    config = read_json(folder / CONFIG_FILE)
    _check_redirect(folder, config)
    return config


def _check_redirect(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder from which transformers would load other weights than its own."""
    if (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{folder} holds {ADAPTER_CONFIG}, so transformers would load the weights of the "
            "adapter's base model and not those of this folder; a whole model was expected. "
            "Merge the adapter (merge_and_unload) and save the result with save_pretrained."
        )
    other = config.get("transformers_weights")
    if other is not None and other != SINGLE_FILE:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} sends transformers to other weights (transformers_weights: "
            f"{shown(other)}); {SINGLE_FILE} or {INDEX_FILE} was expected. Save the model again "
            "with save_pretrained."
        )


def _check_shard_name(index: Path, file: object) -> None:
    """Refuses a shard that is no plain path in the folder (`..`, root, drive, backslash)."""
    if not isinstance(file, str) or not _plain_path(file):
        raise CheckpointError(
            f"{index} names the file {shown(file)}, which is not a plain path inside the "
            "checkpoint folder. Nothing was read from there; do not use this checkpoint unless "
            "you know why it says so."
        )
    if not file.endswith(".safetensors"):
        raise CheckpointError(
            f"{index} names the file {shown(file)}, which is not a safetensors file. {_CONVERT}"
        )


def _plain_path(file: str) -> bool:
    if len(file) > 255 or not file.isprintable() or not encodable(file):
        return False
    return not set(file) & set('\\:*?"<>|') and all(
        part not in ("", ".", "..") for part in file.split("/")
    )


def _check_against_index(
    folder: Path, file: str, present: set[str], expected: frozenset[str], config: dict[str, Any]
) -> None:
    index = folder / INDEX_FILE
    missing = sorted(name for name in expected - present if not _is_tied_head(name, config))
    if missing:
        raise damaged(
            index,
            f"it says that {file} holds {shown(missing[0])}, which is not in it ({len(missing)} "
            "such tensors)",
        )
    if extra := sorted(present - expected):
        raise damaged(
            index,
            f"it does not name {shown(extra[0])}, which is in {file} ({len(extra)} such tensors)",
        )


def _is_tied_head(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor is a tied output head, which loaders take from the embedding."""
    if not name.endswith(_HEADS):
        return False
    try:
        return anatomy_of(config).tied_embeddings
    except AbliteratorError:  # the plan reports it
        return False


def _no_safetensors(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    expected = f"{SINGLE_FILE}, or {INDEX_FILE} and its shards, was expected."
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return (
            f"{folder} has its weights as GGUF ({shown(gguf[0])}); {expected} Use the model it "
            "was made from, or convert it with from_pretrained(FOLDER, "
            "gguf_file=NAME).save_pretrained(NEW_FOLDER)."
        )
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"{folder} has no safetensors, only {shown(pickled[0])}, a pickle, which can run code "
            f"when it is read and is never opened here; {expected} {_CONVERT}"
        )
    if other := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"{folder} has {shown(other[0])}, but nothing that says it is the model; {expected} "
            f"Rename a single file to {SINGLE_FILE}, or save the model again with save_pretrained."
        )
    return f"{folder} has no weights; {expected} Download the model again, all files of it."
