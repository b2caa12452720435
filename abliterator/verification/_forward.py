"""How strongly a subspace was removed from what blocks write, measured by running both models.

Every block of the edited model gets the inputs that it has in the base, so that what differs is
what this block does with them, and not what the blocks before it did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import BoundArguments
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.anatomy import anatomy_of
from abliterator.checkpoint import Checkpoint
from abliterator.errors import CheckpointError
from abliterator.record import EffectiveStrength
from abliterator.verification._strength import Overlap, require_fit

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.model import LoadedModel

Load = Callable[[Path], "LoadedModel"]


def measured_strengths(
    base: Path, edited: Path, basis: Tensor, texts: Sequence[str], *, load: Load
) -> tuple[EffectiveStrength, ...]:
    """The effective strength of each block's write over all tokens of some texts.

    A block's attention already changes what its MLP reads, so a strength other than 1 comes out
    as that of both together, and not exactly as the writers' own.

    Args:
        base: folder of the base model.
        edited: folder of the edited one; it may run where its stored format cannot be read here.
        basis: Q [H, k], orthonormal, or [L, H, k] with one a block.
        texts: plain text, read without a chat template.
        load: loads a folder; one model at a time is held.

    Raises:
        CheckpointError: for a subspace of another width, and for models of other shapes.
        GenerationError: if the memory does not suffice.
    """
    checkpoint = Checkpoint.open(base)
    require_fit(basis, checkpoint)
    anatomy = anatomy_of(checkpoint.config)
    runner = _Runner(anatomy.blocks, anatomy.n_layers)
    model = load(base)
    token_ids = [model.tokenizer(text)["input_ids"] for text in texts]
    streams = [runner.streams(model, ids) for ids in token_ids]
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
    for ids, stream in zip(token_ids, streams, strict=True):
        written = runner.streams(model, ids, inputs=stream)
        for layer, (old, new) in enumerate(zip(stream, written, strict=True)):
            q = (basis if basis.ndim == 2 else basis[layer]).double()
            sums[layer].add(q, (old[1] - old[0]).T, (new[1] - new[0]).T)
    return tuple(overlap.strength("block", layer) for layer, overlap in enumerate(sums))


Stream = list[tuple["Tensor", "Tensor"]]  # a block's input and output, each [T, H] on the host


class _Runner:
    """Passes through the blocks of a model."""

    def __init__(self, blocks: str, n_layers: int) -> None:
        from abliterator.model import block_paths

        self._paths = block_paths(blocks, n_layers)

    def streams(
        self, model: LoadedModel, token_ids: Sequence[int], inputs: Stream | None = None
    ) -> Stream:
        """Input and output of every block in float64, given the `inputs` of another pass if any."""
        import torch

        from abliterator.model import CallHook, hooked

        stream: Stream = []

        def hook(layer: int) -> CallHook:
            def record(output: Tensor, call: BoundArguments) -> Tensor:
                entered = call.arguments["hidden_states"]
                stream.append((entered[0].double().cpu(), output[0].double().cpu()))
                if inputs is None:
                    return output
                return inputs[layer][1].to(output)[None]  # what the next block gets

            return CallHook(record)

        hooks = {path: hook(layer) for layer, path in enumerate(self._paths)}
        with torch.inference_mode(), hooked(model.model, hooks):
            model.model(torch.tensor([list(token_ids)], device=model.device), use_cache=False)
        return stream
