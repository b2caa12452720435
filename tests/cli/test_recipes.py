"""The recipes of the package are found by name, from any folder, and from an installed wheel."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from abliterator.cli import main
from abliterator.recipe import bundled_recipes, load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


def test_all_are_listed_with_model_and_needs(run):
    listed = json.loads(run("recipes", "--json").stdout)
    assert {recipe["name"] for recipe in listed} == {
        p.stem for p in (ROOT / "recipes").glob("*.yaml")
    }
    assert all(load_recipe(Path(r["path"])).model == r["model"] and r["needs"] for r in listed)
    by_name = {recipe["name"]: recipe["needs"] for recipe in listed}
    assert by_name["llama3_1_8b"] == "16 GB of bfloat16 weights, access on the Hub"
    assert by_name["qwen3_1_7b"] == "4.1 GB of bfloat16 weights"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_list_fits_the_terminal(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run("recipes").stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert any(line.startswith("demo ") for line in lines)


def test_show_prints_the_file(run):
    shown = run("recipes", "show", "demo").stdout
    assert shown == (ROOT / "recipes" / "demo.yaml").read_text()
    unknown = run("recipes", "show", "dmeo")
    assert unknown.exit_code == 1
    assert "demo, gemma_2b_it" in unknown.stderr


def test_a_name_is_found_where_no_file_has_it(run, tmp_path):
    (tmp_path / "demo").mkdir()  # not a folder of a build
    done = run("build", "demo", "--set", "layers=[99]")
    assert done.stderr.startswith("RecipeError: `layers` names 99")
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text("nothing")
    assert "demo is not a recipe" in run("build", "demo").stderr


def test_plan_takes_a_recipe_of_the_package_and_the_folder_of_a_run(run, tmp_path):
    planned = json.loads(run("plan", "demo", "--json").stdout)
    assert planned["layers"] == [4]
    (tmp_path / "built" / "work").mkdir(parents=True)
    assert "not a folder that `abliterator build` made" in run("plan", "built").stderr
    assert "neither --set nor --out" in run("plan", "built", "--set", "k=1").stderr


def test_the_wheel_has_the_recipes_where_the_package_looks():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"recipes": "abliterator/data/recipes"}
    assert bundled_recipes()[0].path.parent == ROOT / "recipes"


def test_prompts_of_the_package_are_named_without_their_folder(run, tmp_path):
    run("init", "embedded:demo", "--out", "mine.yaml")
    recipe = load_recipe(tmp_path / "mine.yaml")
    demo = load_recipe(ROOT / "recipes" / "demo.yaml")
    assert recipe.prompts == demo.prompts
    assert recipe.rollouts.max_new_tokens == demo.rollouts.max_new_tokens


@pytest.mark.parametrize(
    ("recipe", "next_step"),
    [
        ("embedded:demo", "init embedded:demo --out"),
        ("Qwen/Qwen3-1.7B", "init Qwen/Qwen3-1.7B --out"),
        ("smolm2", "did you mean the recipe `smollm2`"),
        ("missing.yaml", "`abliterator recipes` lists"),
        (".", "not one that `abliterator build` made"),
    ],
)
def test_what_is_no_recipe_leads_on(run, recipe, next_step):
    done = run("build", recipe)
    assert done.exit_code == 2
    assert next_step in " ".join(done.stderr.split())


def test_a_forgotten_slash_is_seen(run, tiny_folder):
    forgotten = str(tiny_folder()).lstrip("/")
    for command in ("build", "plan", "init"):
        done = run(command, forgotten)
        assert done.exit_code in {1, 2}
        assert f"/{forgotten}" in done.stderr


def test_plan_takes_what_build_takes_and_models(run, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = json.loads(run("plan", "demo", "--json").stdout)
    (tmp_path / "mine").write_text((ROOT / "recipes/demo.yaml").read_text())
    assert json.loads(run("plan", "mine", "--json").stdout)["layers"] == by_name["layers"] != []
    shutil.copytree(tiny_folder(), "demo")  # a model of the same name is the one that is meant
    of_model = json.loads(run("plan", "demo", "--json").stdout)
    assert (of_model["model"], of_model["layers"]) == ("demo", [])
