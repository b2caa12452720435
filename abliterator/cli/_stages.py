"""The commands of single stages: directions, rollouts, judge, benchmarks, card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from abliterator.cli._options import bars_of, read_recipe, recipe_arguments
from abliterator.cli._terminal import echo


def _stage_command(stage: str, help_text: str) -> click.Command:
    """The command of one stage: it runs the stages before it, then the stage."""

    @click.command(name=stage, help=help_text)
    @recipe_arguments()
    def command(recipe: Path, **arguments: Any) -> None:
        from abliterator import pipeline

        parsed, out, options = read_recipe(recipe, **arguments)
        pipeline.run_stages(
            parsed, out, until=stage, options=options, progress=bars_of(parsed, out, options, stage)
        )
        echo(out)

    return command


STAGE_COMMANDS = (
    _stage_command("directions", "Capture activations and find the subspace."),
    _stage_command("rollouts", "Let base and edited answer the evaluation prompts."),
    _stage_command("judge", "Judge the answers of base and edited."),
    _stage_command("benchmarks", "Run lm-eval and conversations on base and edited."),
    _stage_command("card", "Write record.json and the model card."),
)
