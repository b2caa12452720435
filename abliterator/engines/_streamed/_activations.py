"""Keeps the hidden states of batches that wait: in host memory, and on disk above a limit."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abliterator.devices import CPU
from abliterator.files import writable


class Parked(NamedTuple):
    """A tensor's memory, its size in bytes, and where its content is meanwhile.

    Attributes:
        storage: of the tensor; empty, unless it stayed as it was.
        size: bytes.
        content: the bytes in host memory, their offset in the file, or None where they stayed.
    """

    storage: torch.UntypedStorage
    size: int
    content: Tensor | int | None


class Activations:
    """Frees the memory of tensors for a time, though the code of a model still refers to them.

    Whoever parks a tensor must not read it before it is restored.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        """Nothing is written before the limit is reached.

        Args:
            limit: bytes in host memory.
            folder: of the file with what goes beyond; None is the system's folder of such files.
                The file has no name where the system can do that, and is removed when closed: of
                an interrupted process nothing is left.
        """
        self._limit, self._folder, self._in_memory = limit, folder, 0
        self._file: Any | None = None
        self._end, self._gaps = 0, dict[int, list[int]]()

    @property
    def spilled_bytes(self) -> int:
        """Size of the file."""
        return self._end

    def park(self, tensors: Iterable[Tensor]) -> list[Parked]:
        """Frees the memory of tensors, to host memory or the file.

        Raises:
            FileError: if there is no room for the file.
        """
        storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in tensors) if s.nbytes()}
        return [self._park(storage, storage.nbytes()) for storage in storages.values()]

    def restore(self, parked: Iterable[Parked]) -> None:
        """Puts the content of parked tensors back."""
        for storage, size, content in parked:
            if not isinstance(content, int):
                self._in_memory -= size
            if content is None:
                continue
            storage.resize_(size)
            if isinstance(content, Tensor):
                _bytes_of(storage).copy_(content)
            elif storage.device.type == CPU:
                self._read(content, storage)
            else:
                on_host = torch.empty(size, dtype=torch.uint8)
                self._read(content, on_host.untyped_storage())
                _bytes_of(storage).copy_(on_host)

    def close(self) -> None:
        """Removes the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _park(self, storage: torch.UntypedStorage, size: int) -> Parked:
        spilled = self._in_memory + size > self._limit
        on_host = None if storage.device.type == CPU else _bytes_of(storage).cpu()
        content: Tensor | int | None = on_host
        if spilled:
            content = self._write(storage if on_host is None else on_host.untyped_storage())
        else:
            self._in_memory += size
        if content is not None:
            storage.resize_(0)
        return Parked(storage, size, content)

    def _write(self, content: torch.UntypedStorage) -> int:
        """Writes bytes of the host into the file; their offset there."""
        folder, size = self._folder or Path(tempfile.gettempdir()), content.nbytes()
        gaps = self._gaps.get(size)
        offset = gaps.pop() if gaps else self._end
        self._end = max(self._end, offset + size)
        with writable(folder / "activations", size):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - `close`
            self._file.seek(offset)
            data = _memory(content)
            while data:
                data = data[self._file.write(data) :]
        return offset

    def _read(self, offset: int, content: torch.UntypedStorage) -> None:
        assert self._file is not None
        self._file.seek(offset)
        data = _memory(content)
        while data:
            n = self._file.readinto(data)
            if not n:
                raise EOFError("the file of activations was cut")
            data = data[n:]
        self._gaps.setdefault(content.nbytes(), []).append(offset)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory(storage: torch.UntypedStorage) -> memoryview:
    """The memory of a storage on the host; a numpy view of it could not be resized any more."""
    array = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    return memoryview(array).cast("B")
