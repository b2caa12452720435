"""Results of a verification, as `abliterator verify --json` prints them."""

from __future__ import annotations

from pydantic import Field, computed_field

from abliterator.record._measured import Frozen


class Proof(Frozen):
    """Whether the contract holds, and what breaks it: one sentence a fault."""

    faults: tuple[str, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults


class Verification(Proof):
    """A checkpoint against its base; `ok` if it is the base with the edits of edits.json.

    Attributes:
        tensors: tensors of the base.
        edited: tensors that edits.json names.
        identical_bytes: bytes, headers and files beside the weights included, equal to the base's.
            config.json is not among them: it is the base's but for what would be false now.
        edited_bytes: bytes of the edited tensors in the checkpoint.
        max_leak: largest |Qᵀ W'| / |Qᵀ W| measured again; None without a subspace.
        max_apart: of tensors with U and V of their own, the largest distance of the stored one from
            W - s U Vᵀ W (Frobenius), as a multiple of what rounding that gives; None without them.
        sha256: of each weight and auxiliary file of the checkpoint, with the files that abliterator
            adds, by relative path.
        foreign: files of the checkpoint folder that neither the base nor abliterator put there.
        partial: why the stream keeps what no writer writes, which the leak does not show; None
            where it does not.
    """

    tensors: int
    edited: int
    identical_bytes: int
    edited_bytes: int
    max_leak: float | None
    max_apart: float | None = None
    sha256: dict[str, str] = Field(serialization_alias="files")
    foreign: tuple[str, ...]
    partial: str | None = None


class AdapterVerification(Proof):
    """An adapter; `ok` if base and adapter give exactly the checkpoint's weights.

    Attributes:
        modules: modules that the adapter changes.
        max_apart: largest distance |W' - (W + B A)| (Frobenius) of a module, as a multiple of what
            rounding W + B A to the stored type gives; None where that rounds nothing.
        max_leak: largest |Qᵀ (W + B A)| / |Qᵀ W|; None without a subspace.
        sha256: of each file that belongs to the adapter.
        foreign: files of the folder that do not.
    """

    modules: int
    max_apart: float | None
    max_leak: float | None
    sha256: dict[str, str]
    foreign: tuple[str, ...]


class EffectiveStrength(Frozen):
    """How strongly a subspace was removed from what one component of one block writes.

    Attributes:
        component: kind of the writers; "block" for all that a block writes, measured by a pass.
        layer: index of the block, from 0; -1 for embeddings.
        strength: 1 removed, 0 left, above 1 inverted; None where nothing was written.
        leak: |Qᵀ w'| / |Qᵀ w|, what is still written of what was; None where nothing was.
        change_within: share of |w' - w|² that lies in the subspace; None where nothing changed.
    """

    component: str
    layer: int
    strength: float | None
    leak: float | None
    change_within: float | None
