"""Auxiliary files: those beside the weights that belong to an edited checkpoint too.

A file is copied for one of two reasons: a loader may open it, or its licence says it must stay with
the model. Everything else (the base's README and scores, other formats of the same weights, unknown
files) is left out.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

from abliterator.checkpoint._folder import ADAPTER_FILE, INDEX_FILE, SINGLE_FILE, locate_weights
from abliterator.checkpoint._header import encodable
from abliterator.errors import CheckpointError
from abliterator.files import is_closed, readable, shown, too_large

_TOP_LEVEL = (
    "config.json",
    "generation_config*.json",
    "hf_quant_config.json",
    # Tokenizers: the names in transformers' tokenization modules.
    "*tokenizer*.json",
    "tokenizer.*",
    "*.tokenizer",
    "tekken.json",
    "*vocab*.json",
    "vocab.*",
    "merges.*",
    "added_tokens.json",
    "special_tokens_map.json",
    "normalizer.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "byte_maps.json",
    "word_shape.json",
    "word_pronunciation.json",
    "speaker_embeddings_path.json",
    # Images, audio, video.
    "*processor*.json",
    "chat_template*.json",
)
_ANY_LEVEL = (
    "*.jinja",
    *("*.py", "*.cpp", "*.cu", "*.h"),  # custom code, with the sources that it compiles
)
# In capitals or not: some of the names are sentences.
_LEGAL = ("*license*", "*licence*", "notice*", "*notices*", "*use_policy*", "copying*", "*terms*")
_WEIGHTS_OR_PICTURES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"),
    *(".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"),
)
_MAX_BYTES = 512 << 20  # of an auxiliary file; the largest tokenizers have a tenth
# Of these a loader takes the first that is there: one of another model would take over.
_TAKES_OVER = (ADAPTER_FILE, SINGLE_FILE, INDEX_FILE)


def auxiliary_files(folder: Path) -> tuple[list[str], list[str]]:
    """Divides the files beside the weights into auxiliary files and those that are left out.

    Returns:
        (auxiliary, left_out): paths relative to the folder, sorted. A folder without any auxiliary
        file is one entry that ends in "/". Each file of the folder is in one of the two, or is a
        weight file of the checkpoint.

    Raises:
        CheckpointError: the folder cannot be read, has no safetensors, or an auxiliary file is a
            broken link.
    """
    weights = locate_weights(folder)
    keep_index = list(weights.values()) != [None]
    auxiliary: list[str] = []
    left_out: list[str] = []
    with readable(folder):
        files, closed = _list_files(folder)
        for file in files:
            if file in weights:
                continue
            is_auxiliary = keep_index if file == INDEX_FILE else _is_auxiliary(file)
            is_auxiliary = is_auxiliary and encodable(file)
            if is_auxiliary and (folder / file).is_symlink() and not (folder / file).exists():
                raise CheckpointError(
                    f"{folder}{os.sep}{shown(file)} is a link to a file that is not there, and a "
                    "loader may need it. If this is a Hugging Face cache, part of it was deleted: "
                    "download the model again."
                )
            is_auxiliary = is_auxiliary and (folder / file).is_file()
            if is_auxiliary and (size := (folder / file).stat().st_size) > _MAX_BYTES:
                raise too_large(Path(f"{folder}{os.sep}{shown(file)}"), size, _MAX_BYTES)
            (auxiliary if is_auxiliary else left_out).append(file)
    return sorted(auxiliary), _grouped(left_out + closed, included=[*weights, *auxiliary])


def _is_auxiliary(file: str) -> bool:
    name = file.rsplit("/", 1)[-1]
    patterns = _ANY_LEVEL if "/" in file else _TOP_LEVEL + _ANY_LEVEL
    if name.lower().endswith(_WEIGHTS_OR_PICTURES):
        return False
    return any(fnmatchcase(name, pattern) for pattern in patterns) or is_legal(file)


def is_opened_by_loaders(file: str) -> bool:
    """Whether a loader may open a file of this name (a relative path), were it in the folder.

    Weights of other formats are not among them: where there are safetensors, loaders use those.
    """
    return file in _TAKES_OVER or (_is_auxiliary(file) and not is_legal(file))


def is_legal(file: str) -> bool:
    """Whether a file, by its name, holds terms that must stay with the model."""
    name = file.rsplit("/", 1)[-1].lower()
    return any(fnmatchcase(name, pattern) for pattern in _LEGAL)


def _list_files(folder: Path) -> tuple[list[str], list[str]]:
    """All files, and the folders that are not entered ("name/"), relative to `folder`."""
    files, closed = [], []

    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it may not read

    for parent, folders, names in os.walk(folder, onerror=fail):
        base = Path(parent)
        for name in list(folders):
            if is_closed(name) or (base / name).is_symlink():
                folders.remove(name)
                closed.append((base / name).relative_to(folder).as_posix() + "/")
        files += [(base / name).relative_to(folder).as_posix() for name in names]
    return files, closed


def _grouped(left_out: list[str], *, included: list[str]) -> list[str]:
    """Paths left out, where a top-level folder that is left out whole is one entry."""
    used = {file.split("/", 1)[0] for file in included}
    names = set()
    for file in left_out:
        top, inside, _ = file.partition("/")
        names.add(shown(f"{top}/" if inside and top not in used else file))
    return sorted(names)
