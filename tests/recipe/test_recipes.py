"""Every recipe we ship loads, fits its model, and says at its top what it is and how it is run."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

import abliterator
from abliterator.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]


def is_recipe(path: Path) -> bool:
    """Beside recipes lie lm-eval tasks, and data of the scripts that make models and prompts."""
    keys = yaml.safe_load(path.read_text(encoding="utf-8")) if "tasks" not in path.parts else {}
    return not {"model", "layers", "k"}.isdisjoint(keys)


RECIPES = {
    path.relative_to(ROOT / "recipes").as_posix(): path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if is_recipe(path)
}
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")

# blocks of each model, from its config.json; the longest key that a recipe's name opens with
BLOCKS = {
    "llama3_2_1b": 16,
    "llama3_2_3b": 28,
    "qwen1_8b_chat": 24,
    "qwen3_1_7b": 28,
    "gemma_2b_it": 18,
    "llama3_1_8b": 32,
    "phi3_mini_4k": 32,
    "smollm2": 30,
}

LLAMA_1B = "meta-llama/Llama-3.2-1B-Instruct"
LLAMA_3B = "meta-llama/Llama-3.2-3B-Instruct"
# name: (model, layers, k, the figure that its comment must quote)
REPLICATION = {
    "llama3_2_1b_k1": (LLAMA_1B, (9,), 1, "{9} .251/.951"),
    "llama3_2_1b_k3": (LLAMA_1B, (9, 10, 7), 3, "k3 .373/.939"),
    "llama3_2_1b_k4": (LLAMA_1B, (9, 10, 7, 8), 4, "about .36 compliance on 100 prompts"),
    "llama3_2_1b_k5": (LLAMA_1B, (9, 10, 7, 8, 15), 5, "k5 .298/.917"),
    "llama3_2_1b_k15": (LLAMA_1B, tuple(range(1, 16)), 15, "k15 .334/.818"),
    "llama3_2_3b_k1": (LLAMA_3B, (16,), 1, "{16} .262/.975"),
    "llama3_2_3b_k3": (LLAMA_3B, (16, 15, 17), 3, "k3 .344/.962"),
    "llama3_2_3b_k5": (LLAMA_3B, (16, 15, 17, 13, 9), 5, "k5 .374/.950"),
    "qwen1_8b_chat_k1": ("Qwen/Qwen-1_8B-Chat", (15,), 1, "compliance 0.91 (layer 15)"),
    "qwen3_1_7b": ("Qwen/Qwen3-1.7B", "sweep", 1, "compliance 0.96"),
    "gemma_2b_it": ("google/gemma-2b-it", "sweep", 1, "compliance 0.90"),
    "llama3_1_8b": ("meta-llama/Llama-3.1-8B-Instruct", "sweep", 1, "compliance 0.80"),
    "phi3_mini_4k": ("microsoft/Phi-3-mini-4k-instruct", "sweep", 1, "compliance 0.39"),
}


@cache
def loaded(name: str) -> Recipe:
    return load_recipe(RECIPES[name])


def opening(name: str) -> str:
    """The comment block that a recipe opens with, as one line of words."""
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.lstrip("#").strip() for line in lines[:end])


def n_blocks(name: str) -> int:
    if loaded(name).model == "embedded:demo":
        folder = Path(abliterator.__file__).parent / "data" / "demo" / "model"
        return json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    fitting = [key for key in BLOCKS if Path(name).stem.startswith(key)]
    assert fitting, f"add the number of blocks of {loaded(name).model} to BLOCKS"
    return BLOCKS[max(fitting, key=len)]


@pytest.mark.parametrize("name", RECIPES)
def test_opens_with_its_purpose_and_command(name: str):
    comment = opening(name)
    assert f"abliterator build recipes/{name}" in comment
    assert "Hardware:" in comment
    assert RECIPES[name].read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", RECIPES)
def test_layers_exist_in_its_model(name: str):
    layers = loaded(name).layers
    if layers != "sweep":
        assert max(layers) <= n_blocks(name)
        assert min(layers) >= 1


@pytest.mark.parametrize("name", RECIPES)
def test_file_name_agrees_with_k(name: str):
    stated = re.search(r"_k(\d+)$", Path(name).stem)
    recipe = loaded(name)
    if stated:
        assert recipe.k == int(stated[1])
        assert recipe.layers == "sweep" or len(recipe.layers) == recipe.k


@pytest.mark.parametrize("name", RECIPES)
def test_pins_are_whole_commits(name: str):
    recipe = loaded(name)
    sources = [source for source in vars(recipe.prompts).values() if hasattr(source, "revision")]
    pins = [recipe.revision, *(source.revision for source in sources)]
    assert all(re.fullmatch("[0-9a-f]{40}", pin) for pin in pins if pin is not None)


@pytest.mark.parametrize("name", REPLICATION)
def test_a_recipe_of_the_replication_is_as_the_replication_had_it(name: str):
    model, layers, k, figure = REPLICATION[name]
    recipe = loaded(f"{name}.yaml")
    assert (recipe.model, recipe.layers, recipe.k) == (model, layers, k)
    assert recipe.revision is None  # nobody has named a commit: the build resolves one
    assert (recipe.benchmarks.tasks, recipe.benchmarks.limit) == (TASKS, 500)
    assert figure in opening(f"{name}.yaml")


def test_prompts_of_the_replications_recipes_do_not_change_with_the_day():
    """The chat template of Llama 3.2 prints today's date unless it is given one."""
    dated = [name for name in REPLICATION if name.startswith("llama3_")]
    assert dated
    for name in dated:
        kwargs = loaded(f"{name}.yaml").chat.template_kwargs
        assert kwargs == {"date_string": "26 Jul 2024"}


def test_remote_code_is_asked_for_by_one_recipe_alone():
    asking = [name for name in RECIPES if loaded(name).trust_remote_code]
    assert asking == ["qwen1_8b_chat_k1.yaml"]
    assert "--set revision=" in opening("qwen1_8b_chat_k1.yaml")
