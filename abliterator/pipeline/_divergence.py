"""The stage that compares the two sides' distributions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Parts, Stage, estimate, save_value
from abliterator.record import Divergence

if TYPE_CHECKING:
    pass


def _divergence_inputs(run: Run) -> Any:
    return [run.digest("rollouts"), run.recipe.seed]


def _divergence(run: Run) -> tuple[list[Path], Parts]:
    from safetensors.torch import load_file

    from abliterator.divergence import kl_divergence, top1_agreement
    from abliterator.statistics import mean_interval, rate_interval

    tokens = load_file(run.workspace.work / "first_token.safetensors")
    kl = kl_divergence(tokens["base"], tokens["edited"]).tolist()
    agree = top1_agreement(tokens["base"], tokens["edited"])
    found = Divergence(
        kl_first_token=estimate(mean_interval(kl, seed=run.recipe.seed)),
        top1_agreement=estimate(rate_interval(int(agree.sum()), len(agree))),
    )
    return [save_value(run.workspace.work / "divergence.json", found)], {}


DIVERGENCE = Stage("divergence", 1, _divergence_inputs, _divergence)
