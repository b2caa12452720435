"""Model folders that are like another but for the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint, auxiliary_files
from abliterator.files import copy_file, writable, write_text_atomic

if TYPE_CHECKING:
    from torch import Tensor


def copy_beside(source: Checkpoint, folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Makes a folder with all files that a loader opens beside the weights.

    Args:
        source: the model.
        folder: to be made.
        config: keys of config.json that it adds.
    """
    folder.mkdir(parents=True)
    for file in auxiliary_files(source.folder)[0]:
        if file not in (CONFIG_FILE, INDEX_FILE):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source.folder / file, folder / file)
    text = json.dumps({**source.config, **(config or {})}, indent=2)
    write_text_atomic(folder / CONFIG_FILE, text + "\n")


class WeightFolder:
    """Weight files written one after another, and their index at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.n_bytes = 0
        self._files: dict[str, str] = {}

    def write(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes one file."""
        from safetensors.torch import save_file

        path = self.folder / file
        with writable(path, sum(tensor.nbytes for tensor in tensors.values())):
            plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(plain, path, metadata={"format": "pt"})
        self.n_bytes += path.stat().st_size
        self._files |= dict.fromkeys(tensors, file)

    def close(self) -> None:
        """Writes the index, where there are several files."""
        if len(set(self._files.values())) > 1:
            index = {"metadata": {"total_size": self.n_bytes}, "weight_map": self._files}
            write_text_atomic(self.folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def rewritten(source: Checkpoint, folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """A folder with the same tensors in the same files, each with other numbers.

    Args:
        source: the model.
        folder: to be made.
        change: from name and tensor to the new one, of the same shape and dtype.
    """
    from safetensors.torch import load_file

    copy_beside(source, folder)
    written = WeightFolder(folder)
    for file in source.weight_files:
        tensors = load_file(source.folder / file)
        written.write(file, {name: change(name, tensor) for name, tensor in tensors.items()})
    written.close()
