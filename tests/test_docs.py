"""What the README promises exists, and CI runs the README's own commands."""

import re
from pathlib import Path

import pytest
import yaml

from abliterator.cli import main
from abliterator.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_ci_runs_the_readmes_two_commands():
    commands = [line for block in blocks("sh") for line in block.strip().splitlines()]
    assert len(commands) == 2
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in commands:
        assert command in script


def test_every_command_is_documented_and_every_documented_command_exists():
    documented = set(re.findall(r"`abliterator ([a-z-]+)", README))
    hidden_aliases = {"push"}
    assert documented - hidden_aliases == set(main.commands) - hidden_aliases


def test_the_recipe_in_the_readme_is_valid(tmp_path):
    example, *sections = blocks("yaml")
    assert set(yaml.safe_load(example)) >= {"model", "layers", "k"}
    for more in ("", *sections):
        (tmp_path / "r.yaml").write_text(example + more)
        load_recipe(tmp_path / "r.yaml")


def test_the_python_in_the_readme_is_importable():
    (example,) = blocks("python")
    imports = [line for line in example.splitlines() if line.startswith("from ")]
    exec("\n".join(imports), {})


def test_the_house_has_these_rooms():
    package = ROOT / "abliterator"
    rooms = {path.stem for path in package.glob("[a-z]*.py")}
    rooms |= {path.parent.name for path in package.glob("*/__init__.py")}
    table = README.partition("## The house")[2].partition("## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == rooms


@pytest.mark.parametrize("name", re.findall(r"`(recipes/[\w./*]+)`", README))
def test_files_in_the_readme_exist(name):
    assert list(ROOT.glob(name))
