"""Writes every card of this folder again: the demo's, and one for each recipe of the replication.

    python model_cards/render.py         # from demo.json and recipes/*.yaml
    python model_cards/render.py OUT     # ... after taking the demo's record out of a new build

The demo's card is that of a real build, whose record is kept in demo.json. Nobody has run the other
recipes here: their cards say so, and quote the replication's figures as the replication's.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import yaml

from abliterator.card import render_card
from abliterator.recipe import Recipe, load_recipe
from abliterator.record import (
    EditSummary,
    ModelIdentity,
    Provenance,
    Quotation,
    RunRecord,
    Tool,
)

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
NOT_RUN = "not run yet"
SEED = re.compile(r"^# Seed: +(.+)$", re.MULTILINE)


def cards() -> Iterator[tuple[str, str]]:
    """(file name, text) of every card."""
    yield (
        "demo.md",
        render_card(RunRecord.model_validate_json((HERE / "demo.json").read_text("utf-8"))),
    )
    models = yaml.safe_load((HERE / "models.yaml").read_text("utf-8"))
    for path in sorted(RECIPES.glob("*.yaml")):
        seed = SEED.search(path.read_text(encoding="utf-8"))
        if seed is not None:
            recipe = load_recipe(path)
            identity = ModelIdentity(id=recipe.model, revision=NOT_RUN, **models[recipe.model])
            record = planned(recipe, identity, seed[1])
            # as it is written: what is not in it takes the defaults of the version that runs it
            asked = {"recipe": yaml.safe_load(path.read_text(encoding="utf-8"))}
            yield f"{path.stem}.md", render_card(record.model_copy(update=asked))


def planned(recipe: Recipe, model: ModelIdentity, seed: str) -> RunRecord:
    """The record of a recipe that was not run: what it asks for, and no measurement."""
    layers = () if recipe.layers == "sweep" else recipe.layers[: recipe.k]
    return RunRecord(
        tool=Tool(version=version("abliterator")),
        recipe={},
        recipe_digest=NOT_RUN,
        model=model,
        edit=EditSummary(
            layers=layers,
            positions=(recipe.directions.position,),
            k=recipe.k,
            strength={str(component): s for component, s in recipe.edit.strength.items()},
            components=tuple(recipe.edit.strength),
            norm=recipe.edit.norm,
            rounding=recipe.edit.rounding,
            tensors=None,
            max_leak=None,
            median_leak=None,
            output_bytes=None,
            edited_bytes=None,
        ),
        quoted=(Quotation(source="the replication, judged by an LLM", says=seed),),
        provenance=Provenance(
            created=NOT_RUN,
            python=NOT_RUN,
            platform=NOT_RUN,
            packages={},
            device=NOT_RUN,
            dtype=NOT_RUN,
        ),
    )


if __name__ == "__main__":
    for out in sys.argv[1:]:
        shutil.copy(Path(out) / "checkpoint" / "abliterator" / "record.json", HERE / "demo.json")
    for name, text in cards():
        (HERE / name).write_text(text, encoding="utf-8")
