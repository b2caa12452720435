"""What a quantisation method is, and the words for tensors that do not fit it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from abliterator.errors import UnsupportedModel
from abliterator.formats._layout import Layout, Shape


class Header(Protocol):
    """The entry of one tensor in a safetensors header."""

    @property
    def dtype(self) -> str:
        """Safetensors' name of the format."""

    @property
    def shape(self) -> Shape:
        """Lengths of the axes as stored."""


Headers = Mapping[str, Header]
Settings = Mapping[str, Any]


def _is_plain(name: str, headers: Headers, settings: Settings) -> None:
    """No tensor is quantised; a function of a name, so that plans can be pickled."""


def _always(_: Settings) -> bool:
    return True


@dataclass(frozen=True)
class Scheme:
    """One quantisation method.

    Attributes:
        companions: endings of the names of tensors that a quantised weight is stored in, such as
            scales, and the ending of the name that the weight has in plain numbers (of MXFP4, of
            its blocks).
        packed: those of them under which the weight's own numbers are stored.
        recognise: the layout of the tensor `name` if it is quantised, else None.
        skips: keys of the settings for the list of modules that are not quantised; the first that
            is there is written to, or the first.
        inside: key of the settings under which older tools write all of them, as in a second file.
        experts: how the list names all experts of a block, given their module.
        fits: whether the settings are this scheme's, beyond its name.
        without: other changes of the settings: of them, the modules that are no longer quantised,
            and those that still are.
    """

    companions: Mapping[str, str] = field(default_factory=dict)
    packed: tuple[str, ...] = ()
    recognise: Callable[[str, Headers, Settings], Layout | None] = _is_plain
    skips: tuple[str, ...] = ()
    inside: str = ""
    experts: Callable[[str], str] = str
    fits: Callable[[Settings], bool] = _always
    without: Callable[[Settings, Sequence[str], Sequence[str]], dict[str, Any]] | None = None


def misfit(name: str, header: Header, fault: str) -> UnsupportedModel:
    """The error for a tensor that is not stored as config.json and the tensors beside it say."""
    return UnsupportedModel(
        f"Tensor {name} {list(header.shape)} is stored as {header.dtype} {fault}. A checkpoint "
        "with weights, scales and quantization_config that belong together was expected: download "
        "it again, or use the model in bfloat16."
    )
