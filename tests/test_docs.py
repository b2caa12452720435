"""What README, docs and CONTRIBUTING promise exists, and CI runs the README's own commands."""

import importlib
import re
import runpy
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from abliterator.cli import main
from abliterator.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = runpy.run_path(str(ROOT / "scripts" / "reference.py"))["PAGES"]
FOLDERS = "abliterator|docs|model_cards|perf|recipes|scripts|tests"


def blocks(language: str, page: Path = ROOT / "README.md") -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def named_in_pages(pattern: str) -> list[str]:
    """Code spans of all pages that match a pattern as a whole."""
    spans = {span for page in PAGES for span in re.findall(r"`([^`\n]+)`", page.read_text("utf-8"))}
    return sorted(span for span in spans if re.fullmatch(pattern, span))


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute (a field too) within one."""
    module, *attributes = dotted.split(".")
    found = importlib.import_module(module)
    for attribute in attributes:
        module += f".{attribute}"
        if not hasattr(found, attribute) and hasattr(found, "__path__"):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError:
                return False
        fields = getattr(found, "__annotations__", {})
        if not hasattr(found, attribute):
            return attribute in fields
        found = getattr(found, attribute)
    return True


def test_ci_runs_the_readmes_two_commands():
    commands = [line for block in blocks("sh") for line in block.strip().splitlines()]
    assert len(commands) == 2
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in commands:
        assert command in script


def test_hooks_before_a_commit_run_the_checks_of_ci():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    checks = script[script.index('pip install ".[dev]" && pytest') + 1 :]
    assert [line for line in checks if line] == [entry for entry in entries if entry != "pytest"]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == version("abliterator")
    assert citation["license"] == "Apache-2.0"


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_is_up_to_date(name):
    """`python scripts/reference.py` writes it."""
    assert (ROOT / "docs" / name).read_text("utf-8") == REFERENCE[name]()


def test_every_command_and_key_is_in_the_reference():
    commands = (ROOT / "docs" / "commands.md").read_text("utf-8")
    named = set(re.findall(r"^## `abliterator ([a-z-]+)", commands, flags=re.MULTILINE))
    assert named == {name for name, command in main.commands.items() if not command.hidden}
    keys = (ROOT / "docs" / "recipe_keys.md").read_text("utf-8")
    for name in Recipe.model_fields:
        assert f"| `{name}` |" in keys or f"## `{name}`" in keys


def test_pages_are_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    (index, *groups) = settings["nav"]
    listed = [index, *(page for group in groups for pages in group.values() for page in pages)]
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_every_command_that_the_docs_name_exists():
    for page in PAGES:
        named = re.findall(r"`abliterator ([a-z][a-z-]*)", page.read_text("utf-8"))
        assert set(named) <= set(main.commands), page.name


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md"])
def test_recipes_on_pages_are_valid(tmp_path, page):
    example, *sections = blocks("yaml", ROOT / page)
    assert set(yaml.safe_load(example)) >= {"model", "layers", "k"}
    for more in ("{}", *sections):
        merged = {**yaml.safe_load(example), **yaml.safe_load(more)}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(merged))
        load_recipe(tmp_path / "r.yaml")


def test_the_python_in_the_readme_is_importable():
    (example,) = blocks("python")
    imports = [line for line in example.splitlines() if line.startswith("from ")]
    exec("\n".join(imports), {})


def test_the_table_of_packages_is_the_import_contract():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    table = re.findall(r"^\| (\d+) \| `(\w+)` \|", page, flags=re.MULTILINE)
    package = ROOT / "abliterator"
    packages = {path.stem for path in package.glob("[a-z]*.py")}
    packages |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert {name for _, name in table} == packages
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    rows = [sorted(layer.split(" | ")) for layer in reversed(contract["layers"])]
    assert table == [(str(row), name) for row, names in enumerate(rows) for name in names]
    assert "docs/architecture.md" in README


@pytest.mark.parametrize("name", named_in_pages(rf"({FOLDERS})/[\w./*-]+"))
def test_files_that_the_docs_name_exist(name):
    assert bool(list(ROOT.glob(name)))


@pytest.mark.parametrize("name", named_in_pages(r"abliterator(\.\w+)+"))
def test_names_that_the_docs_use_exist(name):
    assert exists(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_docs_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_scripts_that_comments_and_docs_name_exist():
    """Wherever a path of a script stands: in recipes, in docstrings, on pages."""
    places = [*PAGES, ROOT / "CHANGELOG.md"]
    for folder in FOLDERS.split("|"):
        places += [
            p for ending in ("py", "yaml", "md") for p in (ROOT / folder).rglob(f"*.{ending}")
        ]
    named = {
        (name, place.relative_to(ROOT).as_posix())
        for place in places
        for name in re.findall(r"(?<![\w/])(?:scripts|perf)/[\w/]+\.\w+", place.read_text("utf-8"))
    }
    assert len(named) > 20
    assert [(name, place) for name, place in sorted(named) if not (ROOT / name).is_file()] == []


def test_recipes_hold_data_alone():
    endings = {path.suffix for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    assert endings == {".yaml", ".jsonl", ".md"}
