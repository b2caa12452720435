"""The first recipe: it loads, it plans, and its comments are the recipe's own words."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from abliterator import pipeline
from abliterator.cli import main
from abliterator.recipe import Recipe, draft, load_recipe
from tests.bake.test_fp8 import CUT, make
from tests.helpers.hub_server import HubServer
from tests.helpers.tiny import CONFIGS

WHOLE = {"model": "somebody/model", "layers": [3], "k": 1}
HIDDEN = re.compile(r"^( *)#(?=[a-z])", flags=re.MULTILINE)


def init(*arguments: object) -> str:
    done = CliRunner().invoke(main, ["init", *map(str, arguments)])
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("model", [*CONFIGS, "embedded:demo"])
def test_the_recipe_loads_and_plans(model, tiny_folder, tmp_path):
    name = model if ":" in model else str(tiny_folder(model))
    path = tmp_path / "first.yaml"
    assert init(name, "--out", path) == f"{path}\n"
    recipe = load_recipe(path)
    assert (recipe.model, recipe.layers, recipe.k) == (name, "sweep", "auto")
    assert recipe.edit.strength == "auto"
    plan = pipeline.plan_recipe(recipe, tmp_path / "out")
    assert plan.selection is not None
    assert plan.tuning is not None
    assert not [note for note in plan.notes if "nearly equal" not in note]


@pytest.mark.parametrize("model", ["llama", "embedded:demo"])
def test_the_short_recipe_means_what_the_full_one_does(model, tiny_folder, tmp_path):
    name = model if ":" in model else str(tiny_folder(model))
    for path, options in ((tmp_path / "short.yaml", []), (tmp_path / "full.yaml", ["--full"])):
        path.write_text(init(name, *options))
    short, full = load_recipe(tmp_path / "short.yaml"), load_recipe(tmp_path / "full.yaml")
    assert short == full
    assert len((tmp_path / "short.yaml").read_text().splitlines()) < 20
    assert "#prompts:" not in (tmp_path / "short.yaml").read_text()


def test_a_relative_folder_is_found_from_anywhere(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder().parent)
    (tmp_path / "first.yaml").write_text(init("llama"))
    assert load_recipe(tmp_path / "first.yaml").model == str(tiny_folder())


def test_what_is_hidden_are_the_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text(draft(WHOLE))
    (tmp_path / "b.yaml").write_text(HIDDEN.sub(r"\1", draft(WHOLE)))
    hidden, shown = load_recipe(tmp_path / "a.yaml"), load_recipe(tmp_path / "b.yaml")
    assert hidden == shown == Recipe(model="somebody/model", layers=(3,), k=1)
    told = yaml.safe_load((tmp_path / "b.yaml").read_text())
    for name, field in Recipe.model_fields.items():
        keys = getattr(type(field.default), "model_fields", {})
        assert set(told[name]) == set(keys) if keys else name in told


def test_a_key_that_changes_its_words_changes_the_comment():
    words = re.sub(r"\s*\n\s*# ", " ", draft(WHOLE))
    for section in (Recipe, *(type(f.default) for f in Recipe.model_fields.values())):
        for name, field in getattr(section, "model_fields", {}).items():
            first = " ".join((field.description or "").split("\n\n")[0].split())
            assert first in words, (section, name)


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    done = CliRunner().invoke(main, ["init", "embedded:demo", "--out", str(path)])
    assert done.exit_code == 1
    assert "OutputError" in done.stderr
    assert path.read_text() == "mine"


def test_a_model_without_a_chat_template_is_told_of(writable):
    (writable / "chat_template.jinja").unlink(missing_ok=True)
    settings = writable / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text()).items() if k != "chat_template"}
    settings.write_text(json.dumps(kept))
    assert "# Note: The tokenizer has no chat template" in init(writable)
    told = CliRunner().invoke(main, ["plan", str(writable)]).stdout
    assert "note         The tokenizer has no chat template" in told


def test_quantised_weights_are_told_of_and_not_tuned(tmp_path):
    folder = make(tmp_path / "fp8", CUT)
    path = tmp_path / "first.yaml"
    path.write_text(init(folder))
    assert "# Note: The weights are quantised" in path.read_text()
    assert load_recipe(path).edit.strength != "auto"


def test_of_a_model_on_the_hub_the_commit_is_pinned_and_the_gate_told(tiny_folder, tmp_path):
    folder = tiny_folder()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    template = files.pop("chat_template.jinja").decode()
    settings = json.loads(files["tokenizer_config.json"]) | {"chat_template": template}
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    with HubServer() as hub:
        commit = hub.commit("model", "somebody/tiny", files)
        hub.repo("model", "somebody/tiny").gating = "manual"  # and this client has access
        done = subprocess.run(
            [sys.executable, "-m", "abliterator", "init", "somebody/tiny"],
            env=hub.env(tmp_path, PYTHONPATH=str(Path(__file__).parents[2])),
            capture_output=True,
            text=True,
            check=True,
        )
    assert f"revision: {commit}" in done.stdout
    assert "# Note: The model is gated" in done.stdout
    assert "no chat template" not in done.stdout
