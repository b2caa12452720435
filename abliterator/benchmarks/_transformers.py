"""The in-process engine: lm-eval's own transformers model, reading weights as `load_model` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from abliterator.model import ask_for_plain_numbers


def open_transformers(folder: Path, *, device: str, options: dict[str, Any]) -> HFLM:
    """lm-eval's model of the checkpoint in `folder`.

    Args:
        folder: a checkpoint.
        device: as torch names it.
        options: further arguments of lm-eval's HFLM.
    """
    # in bfloat16 the log-likelihoods collapse to a few values, and ties decide
    return _Model(pretrained=str(folder), device=device, softmax_dtype="float32", **options)


class _Model(HFLM):  # type: ignore[misc]  # lm-eval has no types
    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        super()._get_config(*args, **kwargs)
        ask_for_plain_numbers(self._config)
