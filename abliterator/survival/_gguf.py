"""The numbers that a GGUF file stores, as a model folder with the names of its checkpoint."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.checkpoint import Checkpoint
from abliterator.errors import AbliteratorError, QuantizationError
from abliterator.survival._folder import rewritten

if TYPE_CHECKING:
    from torch import Tensor

# Share of a tensor by which its quantisation may be off. A tensor that was read in another order of
# its rows is off by 1.4.
_FAR = 0.8


def write_numbers(source: Checkpoint, gguf: Path, numbers: Path) -> None:
    """Writes a folder like `source` with the numbers that a GGUF file of it stores.

    transformers reads the file, with the decoders of the package gguf: for the types that it knows,
    a model whose weights fit in memory.

    Raises:
        QuantizationError: if they cannot be read, or are those of other tensors.
    """
    stored = _stored(source, gguf)

    def change(name: str, tensor: Tensor) -> Tensor:
        if name not in stored:
            raise QuantizationError(f"transformers reads no tensor {name} from {gguf.name}.")
        read = stored.pop(name).to(tensor.dtype)
        distance = (read.float() - tensor.float()).norm() if read.shape == tensor.shape else None
        if distance is None or distance > _FAR * tensor.float().norm():
            raise QuantizationError(f"transformers reads another tensor {name} from {gguf.name}.")
        return read

    rewritten(source, numbers, change)


def _stored(source: Checkpoint, gguf: Path) -> dict[str, Tensor]:
    """The tensors of a GGUF file by transformers' names."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    from abliterator.model import loading

    options = {}
    if kept_packed := getattr(transformers, "GgufConfig", None):  # newer ones may keep the blocks
        options["quantization_config"] = kept_packed(dequantize=True)
    try:
        # its bar knows no switch, and progress is shown elsewhere
        with loading(source.folder), redirect_stderr(StringIO()):
            config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                source.folder,
                config=config,
                gguf_file=str(gguf.resolve()),
                dtype=torch.float32,
                local_files_only=True,
                **options,
            )
    except AbliteratorError as error:
        raise QuantizationError(f"transformers does not read {gguf.name}: {error}") from error
    return dict(model.state_dict())
