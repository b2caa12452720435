"""How strongly a subspace was removed from what blocks write, measured by running both models.

Every block of the edited model gets the inputs that it has in the base, so that what differs is
what this block does with them, and not what the blocks before it did. Where blocks hold several
streams (hyper-connections), so does every sublayer, and what it hands to the mixing is its write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import BoundArguments
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from abliterator.anatomy import anatomy_of
from abliterator.checkpoint import Checkpoint
from abliterator.errors import CheckpointError, UnsupportedModel
from abliterator.record import EffectiveStrength
from abliterator.verification._strength import Overlap, require_fit

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.anatomy import Anatomy
    from abliterator.model import LoadedModel

Load = Callable[[Path], "LoadedModel"]


def measured_strengths(
    base: Path, edited: Path, basis: Tensor, texts: Sequence[str], *, load: Load
) -> tuple[EffectiveStrength, ...]:
    """The effective strength of each block's write over all tokens of some texts.

    A block's attention already changes what its MLP reads, so a strength other than 1 comes out
    as that of both together, and not exactly as the writers' own. Of several streams it is the
    writers' own.

    Args:
        base: folder of the base model.
        edited: folder of the edited one; it may run where its stored format cannot be read here.
        basis: Q [H, k], orthonormal, or [L, H, k] with one a block.
        texts: plain text, read without a chat template.
        load: loads a folder; one model at a time is held.

    Raises:
        CheckpointError: for a subspace of another width, and for models of other shapes.
        GenerationError: if the memory does not suffice.
        UnsupportedModel: for a model of one stream that is edited in part.
    """
    checkpoint = Checkpoint.open(base)
    require_fit(basis, checkpoint)
    anatomy = anatomy_of(checkpoint.config)
    if anatomy.partial and not anatomy.sublayers:
        raise UnsupportedModel(
            f"What a block of a {anatomy.model_type} writes cannot be told from the rescaled copy "
            "of its input that it hands on, by a pass. Measure its stored weights, without `--run`."
        )
    model, runner = load(base), _Runner(anatomy)
    token_ids = [model.tokenizer(text)["input_ids"] for text in texts]
    written = [runner.writes(model, ids) for ids in token_ids]
    del model
    model = load(edited)
    blocks = model.model.config.get_text_config()
    if (blocks.num_hidden_layers, blocks.hidden_size) != (anatomy.n_layers, anatomy.d_model):
        raise CheckpointError(
            f"{edited} has {blocks.num_hidden_layers} blocks that write {blocks.hidden_size} "
            f"numbers, and {base} has {anatomy.n_layers} that write {anatomy.d_model}. Give the "
            "base that it was made from."
        )
    sums = [Overlap() for _ in range(anatomy.n_layers)]
    for ids, before in zip(token_ids, written, strict=True):
        after = runner.writes(model, ids, base=before)
        for old, new in zip(before, after, strict=True):
            q = (basis if basis.ndim == 2 else basis[old.layer]).double()
            sums[old.layer].add(q, old.write.T, new.write.T)
    return tuple(overlap.strength("block", layer) for layer, overlap in enumerate(sums))


class _Write(NamedTuple):
    """What a module writes: a block, or a sublayer of one that holds several streams.

    Attributes:
        layer: the block's index.
        write: [T, H] float64 on the host.
        output: of the module, from which the write follows; the same.
    """

    layer: int
    write: Tensor
    output: Tensor


class _Runner:
    """Passes through the blocks of a model."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy

    def writes(
        self, model: LoadedModel, token_ids: Sequence[int], base: Sequence[_Write] = ()
    ) -> list[_Write]:
        """What every module writes, and where a `base` is given, its outputs in their places."""
        import torch

        from abliterator.model import CallHook, hooked, residual_paths

        writes: list[_Write] = []

        def hook(layer: int) -> CallHook:
            def record(output: Tensor, call: BoundArguments) -> Tensor:
                write = after = output[0].double().cpu()
                if not self._anatomy.sublayers:
                    write = after - call.arguments["hidden_states"][0].double().cpu()
                writes.append(_Write(layer, write, after))
                return base[len(writes) - 1].output.to(output)[None] if base else output

            return CallHook(record)

        paths = residual_paths(model.model, self._anatomy)
        hooks = {path: hook(layer) for layer, names in enumerate(paths) for path in names}
        with torch.inference_mode(), hooked(model.model, hooks):
            model.model(torch.tensor([list(token_ids)], device=model.device), use_cache=False)
        return writes
