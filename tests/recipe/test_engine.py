from pathlib import Path

import pytest

from abliterator.errors import RecipeError
from abliterator.recipe import Recipe, load_engine, load_recipe

THREE_LINES = "model: somebody/model-1b-it\nlayers: [9, 10, 7]\nk: 2\n"
SERVER = "engine: {kind: server, base_url: 'http://localhost:8000/v1/'}\n"


@pytest.fixture
def recipe(tmp_path):
    def load(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "r.yaml"
        path.write_text(THREE_LINES + text)
        return load_recipe(path, overrides=overrides)

    return load


def test_answers_come_from_this_process_unless_the_recipe_says_otherwise(recipe):
    assert recipe("").engine.kind == "transformers"


def test_the_default_engine_changes_no_digest(recipe):
    plain = recipe("")
    assert "engine" not in plain.published()
    assert recipe("engine: {kind: transformers}").digest == plain.digest
    assert recipe(SERVER).digest != plain.digest


def test_a_server_serves_the_base_under_the_models_name(recipe):
    engine = recipe(SERVER).engine
    assert (engine.base_url, engine.edited_url) == ("http://localhost:8000/v1", None)
    assert (engine.base, engine.edited) == (None, "edited")


def test_a_recipe_is_read_again_from_its_published_form(recipe, tmp_path):
    published = recipe(SERVER).published()
    assert Recipe.model_validate(published).published() == published


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ("{kind: server}", "needs `base_url`"),
        ("{base_url: 'http://localhost:8000'}", "`base_url` belongs to `kind: server`"),
        ("{kind: vllm, edited: x}", "`edited` belongs to `kind: server`"),
        ("{concurrency: 2}", "`concurrency` belongs to `kind: server` or `kind: vllm`"),
        ("{kind: sglang}", "'transformers', 'vllm' or 'server'"),
        ("{kind: vllm, memory: 1.5}", "less than or equal to 1"),
        (
            "{kind: server, base_url: 'http://localhost:8000', parameters: {temperature: 1}}",
            "cannot hold `temperature`",
        ),
        (
            "{kind: server, base_url: 'http://localhost:8000', api_key_env: sk-12345678}",
            "never a key",
        ),
        ("{kind: server, base_url: 'http://me:word@localhost:8000'}", "must hold no credentials"),
    ],
)
def test_what_does_not_fit_is_named(recipe, engine, says):
    with pytest.raises(RecipeError) as caught:
        recipe(f"engine: {engine}")
    assert says in str(caught.value)
    assert "12345678" not in str(caught.value)


def test_how_a_server_is_reached_changes_no_answer(recipe):
    engine = recipe(SERVER).engine
    other = recipe(SERVER, "engine.concurrency=1", "engine.timeout=5", "engine.api_key_env=KEY")
    assert other.engine.affecting_answers() == engine.affecting_answers()
    renamed = recipe(SERVER, "engine.base=other")
    assert renamed.engine.affecting_answers() != engine.affecting_answers()


def test_the_interpreter_of_vllm_is_relative_to_the_recipe_and_published_without_folder(
    recipe, tmp_path
):
    (tmp_path / "venv").symlink_to("elsewhere")
    found = recipe("engine: {kind: vllm, python: venv/bin/python}")
    assert found.engine.python == str(tmp_path / "venv" / "bin" / "python")
    assert found.published()["engine"]["python"] == "python"
    assert recipe("engine: {kind: vllm, python: python3}").engine.python == "python3"
    assert recipe("", "engine.kind=vllm", "engine.python=./p").engine.python == str(
        Path.cwd() / "p"
    )


def test_the_section_alone_is_read_from_overrides():
    engine = load_engine(["engine.kind=server", "engine.base_url=http://localhost:1/v1"])
    assert engine.base_url == "http://localhost:1/v1"
    with pytest.raises(RecipeError, match="Only `engine` can be set here"):
        load_engine(["k=3"])
