"""Auxiliary files: those beside the weights that belong to an edited checkpoint too.

A file is copied for one of two reasons: a loader may open it, or its licence says it must stay with
the model. Everything else (the base's README and scores, other formats of the same weights, unknown
files) is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from abliterator.checkpoint._folder import ADAPTER_CONFIG, INDEX_FILE, SINGLE_FILE, locate_weights
from abliterator.checkpoint._header import encodable
from abliterator.errors import CheckpointError
from abliterator.files import is_closed, package_yaml, readable, shown, too_large, walk

_MAX_BYTES = 512 << 20  # of an auxiliary file; the largest tokenizers have a tenth
# Of these a loader takes the first that is there: one of another model would take over.
_TAKES_OVER = (ADAPTER_CONFIG, SINGLE_FILE, INDEX_FILE)


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
        for path in walk(folder):
            file = path.relative_to(folder).as_posix()
            if path.is_dir():
                left_out += [f"{file}/"] if is_closed(path) else []
                continue
            if file in weights:
                continue
            is_auxiliary = keep_index if file == INDEX_FILE else _is_auxiliary(file)
            is_auxiliary = is_auxiliary and encodable(file)
            if is_auxiliary and path.is_symlink() and not path.exists():
                raise CheckpointError(
                    f"{folder}{os.sep}{shown(file)} is a link to a file that is not there, and a "
                    "loader may need it. If this is a Hugging Face cache, part of it was deleted: "
                    "download the model again."
                )
            is_auxiliary = is_auxiliary and path.is_file()
            if is_auxiliary and (size := path.stat().st_size) > _MAX_BYTES:
                raise too_large(Path(f"{folder}{os.sep}{shown(file)}"), size, _MAX_BYTES)
            (auxiliary if is_auxiliary else left_out).append(file)
    return sorted(auxiliary), _grouped(left_out, included=[*weights, *auxiliary])


def _is_auxiliary(file: str) -> bool:
    name, names = file.rsplit("/", 1)[-1], _names()
    if name.lower().endswith(tuple(names["never"])):
        return False
    patterns = names["any_level"] + ([] if "/" in file else names["top_level"])
    return _fits(name, patterns) or is_legal(file)


def is_opened_by_loaders(file: str) -> bool:
    """Whether a loader may open a file of this name (a relative path), were it in the folder.

    Weights of other formats are not among them: where there are safetensors, loaders use those.
    """
    return file in _TAKES_OVER or (_is_auxiliary(file) and not is_legal(file))


def is_legal(file: str) -> bool:
    """Whether a file, by its name, holds terms that must stay with the model."""
    return _fits(file.rsplit("/", 1)[-1].lower(), _names()["legal"])


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@cache
def _names() -> dict[str, list[str]]:
    names: dict[str, list[str]] = package_yaml("abliterator.checkpoint", "auxiliary.yaml")
    return names


def _grouped(left_out: list[str], *, included: list[str]) -> list[str]:
    """Paths left out, where a top-level folder that is left out whole is one entry."""
    used = {file.split("/", 1)[0] for file in included}
    names = set()
    for file in left_out:
        top, inside, _ = file.partition("/")
        names.add(shown(f"{top}/" if inside and top not in used else file))
    return sorted(names)
