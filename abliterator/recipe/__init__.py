"""A recipe: yaml to a frozen typed `Recipe`, its canonical form and its digest.

A recipe holds everything that changes a weight or a score. Folders, device and dtype of computation
are flags. Three lines are a whole recipe:

    model: meta-llama/Llama-3.2-3B-Instruct
    layers: [16, 15, 17, 13, 9]
    k: 5

This package reads only the recipe's file and no model: the plan checks whether layer 16 exists.

    recipe = load_recipe(Path("recipes/demo.yaml"), overrides=["k=1"])
    recipe.edit.strength["attention"], recipe.digest
"""

from abliterator.recipe._benchmarks import (
    OPENAI_KEY,
    BenchmarkEngine,
    Benchmarks,
    BenchmarkTask,
    DivergenceSettings,
    Preset,
)
from abliterator.recipe._bundled import BundledRecipe, bundled_recipes
from abliterator.recipe._directions import BY_WRITER, DirectionSettings
from abliterator.recipe._draft import draft, short_draft
from abliterator.recipe._edit import Edit, Selection, ranges_of
from abliterator.recipe._engine import STARTED_KEY, EngineKind, EngineServer, EngineSettings
from abliterator.recipe._judge import JudgeSettings, Rollouts
from abliterator.recipe._pairs import PairExample, PairsSpec
from abliterator.recipe._prompts import Capture, Chat, Prompts, Source
from abliterator.recipe._publish import Publish, Requirements
from abliterator.recipe._read import load_edit, load_engine, load_judge, load_pairs, load_recipe
from abliterator.recipe._recipe import Recipe
from abliterator.recipe._server import Prices, ServerSettings
from abliterator.recipe._tuning import Tuning
from abliterator.recipe._yaml import to_yaml

__all__ = [
    "BY_WRITER",
    "OPENAI_KEY",
    "STARTED_KEY",
    "BenchmarkEngine",
    "BenchmarkTask",
    "Benchmarks",
    "BundledRecipe",
    "Capture",
    "Chat",
    "DirectionSettings",
    "DivergenceSettings",
    "Edit",
    "EngineKind",
    "EngineServer",
    "EngineSettings",
    "JudgeSettings",
    "PairExample",
    "PairsSpec",
    "Preset",
    "Prices",
    "Prompts",
    "Publish",
    "Recipe",
    "Requirements",
    "Rollouts",
    "Selection",
    "ServerSettings",
    "Source",
    "Tuning",
    "bundled_recipes",
    "draft",
    "load_edit",
    "load_engine",
    "load_judge",
    "load_pairs",
    "load_recipe",
    "ranges_of",
    "short_draft",
    "to_yaml",
]
