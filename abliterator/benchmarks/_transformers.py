"""The in-process engine: lm-eval's own transformers model, reading weights as `load_model` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from abliterator.errors import BenchmarkError
from abliterator.model import ask_for_plain_numbers


def open_transformers(folder: Path, *, device: str, options: dict[str, Any]) -> HFLM:
    """lm-eval's model of the checkpoint in `folder`.

    Args:
        folder: a checkpoint.
        device: as torch names it.
        options: further arguments of lm-eval's HFLM.

    Raises:
        BenchmarkError: if lm-eval computes on a device of another type.
    """
    wanted = torch.device(device)
    # lm-eval knows some devices by their index alone, and takes another for a name it does not know
    name = "cpu" if wanted.type == "cpu" else f"{wanted.type}:{wanted.index or 0}"
    # in bfloat16 the log-likelihoods collapse to a few values, and ties decide
    model = _Model(pretrained=str(folder), device=name, softmax_dtype="float32", **options)
    if model.device.type != wanted.type:
        raise BenchmarkError(
            f"lm-eval computes on {model.device}, though {device} is asked for, so that its scores "
            f"would be of another device than the record says. Use `--device {model.device.type}`."
        )
    return model


class _Model(HFLM):  # type: ignore[misc]  # lm-eval has no types
    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        super()._get_config(*args, **kwargs)
        ask_for_plain_numbers(self._config)
