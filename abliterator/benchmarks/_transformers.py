"""The in-process engine: lm-eval's own transformers model, reading weights as `load_model` does."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from abliterator.errors import BenchmarkError
from abliterator.model import (
    ask_for_plain_numbers,
    is_packed,
    load_model,
    main_device,
    placement_of,
)


def open_transformers(
    folder: Path, *, device: str, max_memory: int | None, options: dict[str, Any]
) -> HFLM:
    """lm-eval's model of the checkpoint in `folder`.

    Args:
        folder: a checkpoint.
        device: as `load_model` takes it.
        max_memory: bytes of weights on a device at most, where the model is spread.
        options: further arguments of lm-eval's HFLM.

    Raises:
        BenchmarkError: if lm-eval computes on a device of another type, or options have no meaning
            for a model that is spread over several devices or whose weights are packed.
    """
    weights: dict[str, Any] = {"device": device, "max_memory": max_memory}
    places = placement_of(
        folder,
        **weights,
        dtype=_dtype(options),
        trust_remote_code=bool(options.get("trust_remote_code")),
    )
    first = torch.device(main_device(places))
    # lm-eval knows some devices by their index alone, and takes another for a name it does not know
    name = "cpu" if first.type == "cpu" else f"{first.type}:{first.index or 0}"
    packed = is_packed(folder)
    model = _Model(
        weights=weights if len(places) > 1 or packed else None,
        packed=packed,
        pretrained=str(folder),
        device=name,
        parallelize=len(places) > 1,
        # in bfloat16 the log-likelihoods collapse to a few values, and ties decide
        softmax_dtype="float32",
        **options,
    )
    if model.device.type != first.type:
        raise BenchmarkError(
            f"lm-eval computes on {model.device}, though {device} is asked for, so that its scores "
            f"would be of another device than the record says. Use `--device {model.device.type}`."
        )
    return model


# Options of lm-eval's loading that `load_model` takes too, or that say where weights lie.
_HONOURED = {"dtype", "gpus", "parallelize", "quantization_config", "trust_remote_code"}


class _Model(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """HFLM, but `load_model` loads a model that is spread, or whose weights are packed."""

    def __init__(
        self, *, weights: dict[str, Any] | None, packed: bool = False, **options: Any
    ) -> None:
        self._weights, self._packed = weights, packed
        super().__init__(**options)

    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        super()._get_config(*args, **kwargs)
        ask_for_plain_numbers(self._config)
        if self._packed:  # `load_model` decodes them, and leaves nothing quantised
            del self._config.quantization_config

    def _create_model(self, pretrained: str, **options: Any) -> None:
        if self._weights is None:
            super()._create_model(pretrained, **options)
            return
        defaults = signature(HFLM._create_model).parameters
        unknown = sorted(
            name
            for name, value in options.items()
            if name not in _HONOURED
            and not (name in defaults and value in (defaults[name].default, None, False, ""))
        )
        if unknown:
            raise BenchmarkError(
                f"`benchmarks.engine.options` says {', '.join(unknown)}, which is not possible for "
                "a model that is spread over several devices, or whose weights are packed. Leave "
                "it out, or use one device."
            )
        self._model = load_model(
            Path(pretrained),
            **self._weights,
            dtype=_dtype(options),
            trust_remote_code=bool(options.get("trust_remote_code")),
        ).model


def _dtype(options: dict[str, Any]) -> str | None:
    """The dtype of weights in lm-eval's options; None is the stored one."""
    dtype = options.get("dtype")
    return None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
