"""Every model type of the table in pieces against whole: equal bit by bit, or why not.

    python -m tests.placement_table              # all of them: some minutes
    python -m tests.placement_table llama bloom

Of each tiny model: the captured means, greedy answers, log-probabilities of the base, under the
previewed edit and under an intervention, and one step of descent on the edit's directions. In
pieces it lies in host memory and on disk, against the CPU; and on two stand-in devices, against
one. "rounding" are differences below 2e-6, where one of the CPU's kernels or another computes with
weights that lie elsewhere. Exit code: 1 where figures differ, or an error has no name.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from abliterator.bake import EditPlan
from abliterator.errors import AbliteratorError
from abliterator.model import LoadedModel, load_model
from tests.anatomy.test_architectures import NAMES, planned
from tests.helpers import stand_in
from tests.helpers.architectures import save
from tests.helpers.tiny import train_tokenizer
from tests.model.test_placement import machine_with_two_devices
from tests.stand_in.test_model_types import NOT_ON_THE_CPU, QUESTIONS

ROUNDING = 2e-6


def main() -> int:
    """One line a model type, then counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", help="model types [default: all]")
    names = parser.parse_args().name or NAMES
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    counts: Counter[tuple[str, str]] = Counter()
    for name in names:
        results = compare(name)
        print(f"{name:28s}", "   ".join(f"{k}: {v}" for k, v in results.items()), flush=True)
        for place, result in results.items():
            counts[place, result.partition(":")[0]] += 1
    for (place, result), count in sorted(counts.items()):
        print(f"{place}, {result}: {count} of {len(names)}")
    return 1 if any(result in ("differs", "fails") for _, result in counts) else 0


def compare(name: str) -> dict[str, str]:
    """By place: "equal", or what differs, why it is refused, how it fails."""
    results = {}
    with tempfile.TemporaryDirectory() as scratch, sdpa_kernel(SDPBackend.MATH):
        folder = Path(scratch)
        _, plan = planned(save(name, folder))
        train_tokenizer().save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        places: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
            "host and disk": (
                no_accelerator,
                {"device": "auto", "max_memory": size * 6 // 10},
                "cpu",
            )
        }
        if stand_in.available():
            places["two devices"] = (machine_with_two_devices, {"device": "balanced"}, "fake")
        for place, (machine, spread, whole) in places.items():
            with machine():
                results[place] = outcome(name, folder, plan, spread, whole)
    return results


@contextmanager
def no_accelerator() -> Iterator[None]:
    """A machine without one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.accelerator.is_available", lambda: False)
        yield


def outcome(name: str, folder: Path, plan: EditPlan, spread: dict[str, Any], whole: str) -> str:
    """Compares the figures of one model in pieces with those of the whole one."""
    try:
        expected = figures(load_model(folder, dtype="float32", device=whole), plan, name)
    except AbliteratorError as error:
        return f"refused whole: {shown(error, folder)}"
    try:
        loaded = load_model(folder, dtype="float32", **spread)
        if len({*loaded.placement.values()}) < 2:
            return f"whole: it lies in one piece, {loaded.placement}"
        results = figures(loaded, plan, name)
    except AbliteratorError as error:
        return f"refused: {shown(error, folder)}"
    except Exception as error:  # noqa: BLE001  (whatever a model's own code raises is reported)
        return f"fails: {type(error).__name__}: {shown(error, folder)}"
    apart = {key: difference(results[key], value) for key, value in expected.items()}
    unequal = ", ".join(f"{key} by {value:.1e}" for key, value in apart.items() if value)
    if not unequal:
        return "equal"
    return f"{'rounding' if max(apart.values()) < ROUNDING else 'differs'}: {unequal}"


def figures(loaded: LoadedModel, plan: EditPlan, name: str) -> dict[str, Any]:
    """Answers to all questions that a tiny model answers on the CPU."""
    asked = {key: ask for key, ask in QUESTIONS.items() if (name, key) not in NOT_ON_THE_CPU}
    return {key: ask(loaded, plan, name) for key, ask in asked.items()}


def shown(error: Exception, folder: Path) -> str:
    """Its message, on one line."""
    return " ".join(str(error).split()).replace(str(folder), "FOLDER")[:200]


def difference(one: Any, other: Any) -> float:
    """The largest difference of two figures, wherever they lie; 0 where all bits are equal."""
    if not isinstance(one, torch.Tensor):
        return float(one != other)
    if torch.equal(one.cpu(), other.cpu()):
        return 0.0
    return float((one.cpu() - other.cpu()).abs().max())


if __name__ == "__main__":
    sys.exit(main())
