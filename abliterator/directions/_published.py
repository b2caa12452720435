"""Directions as a file that others can use: what is removed, where, and how strongly.

A safetensors file with everything that an intervention at run time needs. docs/directions.md has
the format, and ten lines that read it without this package.

    shared = load_directions("out/checkpoint")
    with shared.ablated(model):                  # as the baked weights compute
        model.generate(...)
    with shared.added(model, layer=14, scale=-1): ...
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from abliterator.errors import DirectionError
from abliterator.files import write_bytes_atomic
from abliterator.subspace import Removal

if TYPE_CHECKING:
    from torch import nn

PUBLISHED = "abliterator/directions.safetensors"
"""Where it lies in a checkpoint."""
FORMAT, VERSION = "abliterator directions", "1"


@dataclass(frozen=True)
class Site:
    """A module whose output y is edited: y <- y - s A Bᵀ y.

    Attributes:
        module: its path in the model.
        block: index of the block that it belongs to, from 0; -1 for embeddings.
        component: what part of the block it is.
        strength: s.
        read: name of the tensor B [H, k], or [L, H, k] of which the block's is used.
        take: the same of A.
        keeps_bias: whether the module's bias is no part of y: y <- y - s A Bᵀ (y - b).
    """

    module: str
    block: int
    component: str
    strength: float
    read: str = "subspace"
    take: str = "subspace"
    keeps_bias: bool = False


@dataclass(frozen=True)
class PublishedDirections:
    """Directions with the sites of their removal.

    Attributes:
        tensors: `subspace` Q [H, k], or [L, H, k] with one a block, unless every site has an edit
            of its own; `directions` [L, H], as extracted, of which row l - 1 is that of residual
            layer l; and those that sites name.
        sites: where the subspace is removed.
        metadata: all strings of the file: base model, layers, positions, blocks, sizes.
        obstacle: why no intervention equals the baked edit; None if one does.
    """

    tensors: Mapping[str, Tensor]
    sites: tuple[Site, ...]
    metadata: Mapping[str, str]
    obstacle: str | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Residual layers, from 1, whose directions the subspace spans, in order of preference."""
        return tuple(json.loads(self.metadata["layers"]))

    def direction(self, layer: int) -> Tensor:
        """The extracted direction r [H] at a residual layer, 1 .. L, not normalised.

        Raises:
            DirectionError: for a layer that the file has no direction of.
        """
        directions = self.tensors["directions"]
        if not 1 <= layer <= len(directions):
            raise DirectionError(
                f"There are directions of the layers 1 to {len(directions)}, and none of {layer}. "
                "Layer l is the output of block l - 1."
            )
        return directions[layer - 1]

    @contextmanager
    def ablated(self, model: nn.Module, *, scale: float = 1.0) -> Iterator[None]:
        """Removes the subspace at run time, as the baked weights do, by hooks on a model.

        Computed in float32 at least, and rounded once; equal to the baked weights up to rounding.

        Args:
            model: the base, as transformers loads it.
            scale: of all strengths; 1 is the edit as it was baked, 0 none.

        Raises:
            DirectionError: where no function of a module's output equals the edit.
            UnsupportedModel: for a model that lacks one of the modules.
        """
        from abliterator.model import hooked

        if self.obstacle is not None:
            raise DirectionError(
                f"This edit has no run-time form: {self.obstacle}. Use the checkpoint itself."
            )
        with hooked(model, {site.module: self._hook(model, site, scale) for site in self.sites}):
            yield

    @contextmanager
    def added(self, model: nn.Module, *, layer: int, scale: float) -> Iterator[None]:
        """Adds a direction after a block, at every token: h <- h + scale r (steering).

        Where the block holds several residual streams, it is added to each of them.

        Args:
            model: the base, as transformers loads it.
            layer: residual layer, 1 .. L.
            scale: of r; positive towards the behaviour, negative away from it.

        Raises:
            DirectionError: for a layer that the file has no direction of.
            UnsupportedModel: for a model that lacks the block.
        """
        from abliterator.model import block_paths, hooked, in_each_stream

        direction = scale * self.direction(layer)
        path = block_paths(self.metadata["blocks"], layer)[-1]

        def add(hidden: Tensor) -> Tensor:
            return in_each_stream(hidden, len(direction), lambda h: h + direction.to(h))

        with hooked(model, {path: add}):
            yield

    def _hook(self, model: nn.Module, site: Site, scale: float) -> partial[Tensor]:
        def of_block(name: str) -> Tensor:
            tensor = self.tensors[name]
            return tensor[site.block] if tensor.ndim == 3 else tensor

        removal = Removal(of_block(site.take), of_block(site.read))
        module = dict(model.named_modules()).get(site.module)  # `hooked` names one that is missing
        bias = getattr(module, "bias", None) if site.keeps_bias else None
        on = cache(lambda dtype, device: removal.to(dtype, device))
        return partial(_removed_of, on, scale * site.strength, bias)


def _removed_of(
    on: Callable[[torch.dtype, torch.device], Removal],
    strength: float,
    bias: Tensor | None,
    hidden: Tensor,
) -> Tensor:
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    written = wide if bias is None else wide - bias.to(wide)
    removed = on(wide.dtype, wide.device).removed(written)
    return (wide - strength * removed).to(hidden.dtype)


def save_published(
    path: Path,
    *,
    tensors: Mapping[str, Tensor],
    sites: Sequence[Site],
    metadata: Mapping[str, str],
    obstacle: str | None,
) -> None:
    """Writes the file atomically; arguments as the attributes of `PublishedDirections`."""
    stated = {
        "format": FORMAT,
        "version": VERSION,
        "operation": "ablate",
        "formula": "y <- y - strength * (y @ read) @ take.T, y the output of the site's module",
        **metadata,
        "sites": json.dumps([asdict(site) for site in sites]),
    }
    if obstacle is not None:
        stated["obstacle"] = obstacle
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes_atomic(path, _in_order(save(contiguous, metadata=stated)))


def _in_order(data: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors writes them in another order each time.

    So the same build gives the same bytes.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[end:]


def load_directions(path: str | Path) -> PublishedDirections:
    """Reads the directions of a checkpoint.

    Args:
        path: the file, the checkpoint's folder, or the output folder of a build.

    Raises:
        DirectionError: for a file that cannot be read, or is not of this format and version.
    """
    file = _file_of(Path(path))
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DirectionError(f"Cannot read directions from {file}: {error}.") from error
    stated = metadata.get("format"), metadata.get("version")
    if stated != (FORMAT, VERSION):
        raise DirectionError(
            f"{file} states the format and version {stated}; ({FORMAT!r}, {VERSION!r}) was "
            f"expected: {PUBLISHED} of a checkpoint that `abliterator build` made."
        )
    try:
        sites = tuple(Site(**site) for site in json.loads(metadata["sites"]))
        published = PublishedDirections(tensors, sites, metadata, metadata.get("obstacle"))
        _require_whole(published)
    except (KeyError, TypeError, ValueError) as error:
        raise DirectionError(
            f"{file} is damaged: {error!r}. Take it from its checkpoint again."
        ) from error
    return published


def _file_of(path: Path) -> Path:
    candidates = (path / PUBLISHED, path / "checkpoint" / PUBLISHED) if path.is_dir() else (path,)
    return next((file for file in candidates if file.is_file()), candidates[0])


def _require_whole(published: PublishedDirections) -> None:
    """Raises ValueError or KeyError for what does not fit together."""
    width = published.tensors["directions"].shape[1]
    json.loads(published.metadata["layers"])
    for site in published.sites:
        ranks = set()
        for name in (site.read, site.take):
            tensor = published.tensors[name]
            shape = tuple(tensor.shape)
            is_by_block = len(shape) == 3 and 0 <= site.block < shape[0]
            if not (len(shape) == 2 or is_by_block) or shape[-2] != width:
                raise ValueError(f"{name} of shape {shape} does not fit {site.module}")
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} has numbers that are not finite, or none that are real")
            ranks.add(shape[-1])
        if len(ranks) > 1:
            raise ValueError(f"{site.read} and {site.take} of {site.module} have several ranks")
        if not isfinite(site.strength):
            raise ValueError(f"the strength of {site.module} is {site.strength}")
