"""Moments of one prompt set while it is captured, and the file from which a later run goes on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING
from zlib import crc32

from abliterator.files import write_bytes_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.directions import Position
    from abliterator.subspace import Moments, MomentSet

# Sums are written after every batch where that takes less than this, else in so much of the time.
_SHORT_S = 0.005
_SHARE = 1 / 20
_CHECK_BYTES = 4  # CRC-32 of the rest of the file, at its start


class CapturedSet:
    """Moments of a set and of parts of it by position, and all vectors where they are wanted.

    The sums are taken in the order of the batches, so an interrupted capture that goes on has the
    bits of one that was not. They are written after every batch, without waiting for the disk;
    less often where they are so large that this would take long.

    Attributes:
        done: indices of the prompts that are in the sums.
        vectors: [N, P, L, H] float32, or None.
    """

    def __init__(
        self,
        path: Path,
        parts: Mapping[str, Collection[int]],
        positions: Sequence[Position],
        shape: tuple[int, int],
        *,
        vectors: Tensor | None,
    ) -> None:
        self._path, self._parts, self._positions = path, parts, positions
        self._written, self._cost, self._is_whole = perf_counter(), 0.0, True
        self.done: set[int] = set()
        self.vectors = vectors
        begun = self._read() if path.is_file() else {}
        self._moments: dict[tuple[str, Position], Moments] = self._begin(begun, shape)

    def _begin(
        self, begun: Mapping[tuple[str, Position], MomentSet], shape: tuple[int, int]
    ) -> dict[tuple[str, Position], Moments]:
        from abliterator.subspace import Moments

        keys = [(part, position) for part in self._parts for position in self._positions]
        return {key: Moments(*shape, begun.get(key)) for key in keys}

    def add(self, batch: Sequence[int], residuals: Tensor) -> None:
        """Adds the residuals [N, P, L, H] of a batch; writes the sums, unless that takes long."""
        self._is_whole = False  # an interrupt may come between two sums
        for (part, position), accumulated in self._moments.items():
            rows = [row for row, index in enumerate(batch) if index in self._parts[part]]
            if rows:
                accumulated.update(residuals[rows, self._positions.index(position)])
        if self.vectors is not None:
            self.vectors[batch] = residuals.float().cpu()
        self.done.update(batch)
        self._is_whole = True
        if self._cost < _SHORT_S or perf_counter() - self._written > self._cost / _SHARE:
            self.write()

    def frozen(self) -> dict[tuple[str, Position], MomentSet]:
        """The moments of every part at every position."""
        return {key: accumulated.freeze() for key, accumulated in self._moments.items()}

    def write(self) -> None:
        """Writes the sums, unless an interrupt came between two of them."""
        import torch
        from safetensors.torch import save

        if not self._is_whole:
            return
        start = perf_counter()
        tensors = {"done": torch.tensor(sorted(self.done))}
        if self.vectors is not None:
            tensors["vectors"] = self.vectors
        for (part, position), accumulated in self._moments.items():
            moments, name = accumulated.freeze(), f"{part}@{position}"
            tensors |= {f"{name}.mean": moments.mean, f"{name}.m2": moments.m2}
            tensors[f"{name}.n"] = torch.tensor(moments.n)
        data = save(tensors)
        check = crc32(data).to_bytes(_CHECK_BYTES)
        write_bytes_atomic(self._path, check + data, is_durable=False)
        self._written = perf_counter()
        self._cost = self._written - start

    def _read(self) -> dict[tuple[str, Position], MomentSet]:
        """The sums in the file; none where a loss of power left it damaged."""
        from safetensors.torch import load

        from abliterator.subspace import MomentSet

        content = self._path.read_bytes()
        check, data = content[:_CHECK_BYTES], content[_CHECK_BYTES:]
        if check != crc32(data).to_bytes(_CHECK_BYTES) or not data:
            return {}
        tensors = load(data)
        self.done = set(tensors["done"].tolist())
        self.vectors = tensors.get("vectors")
        names = {(p, i): f"{p}@{i}" for p in self._parts for i in self._positions}
        return {
            key: MomentSet(
                int(tensors[f"{name}.n"]), tensors[f"{name}.mean"], tensors[f"{name}.m2"]
            )
            for key, name in names.items()
        }
