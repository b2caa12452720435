"""Settings and keys of the API judge. After failures: test_secrets.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from pydantic import ValidationError

from abliterator.recipe import JudgeSettings
from tests.judge.asking import KEY


@pytest.mark.parametrize(
    "broken",
    [
        {"api_key_env": KEY},
        {"base_url": f"https://me:{KEY}@example.org"},
        {"base_url": f"https://example.org/v1#token={KEY}"},
        {"base_url": f"https://example.org/v1?key={KEY}"},
        {"base_url": f"https://{KEY}@example.org"},
        {"api_key": KEY},
        {"parameters": {"api_key": KEY}},
        {"parameters": {"extra_headers": {"Authorization": f"Bearer {KEY}"}}},
        {"parameters": {"metadata": [{"note": KEY}]}},
        {"parameters": {"X-Api-Key": KEY}},
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_shown(broken, tmp_path):
    from abliterator.errors import RecipeError
    from abliterator.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"model": "m", "layers": [1], "k": 1,
                                "judge": {"kind": "openai", **broken}}))  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "judge" in str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "engine",
    [
        {"base_url": f"http://me:{KEY}@localhost:1/v1", "edited_url": "http://localhost:2/v1"},
        {"base_url": "http://localhost:1/v1", "edited_url": f"http://localhost:2/v1#{KEY}"},
        {"kind": "vllm", "options": {"api_key": KEY}},
        {"kind": "vllm", "options": {"header": {"Authorization": KEY}}},
        {"kind": "vllm", "options": {"auth_token": KEY}},
    ],
)
def test_a_key_among_benchmark_settings_is_refused_and_not_shown(engine, tmp_path):
    from abliterator.errors import RecipeError
    from abliterator.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    engine = {"kind": "server", **engine}
    path.write_text(json.dumps({"model": "m", "layers": [1], "k": 1,
                                "benchmarks": {"tasks": ["t"], "engine": engine}}))  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "benchmarks.engine" in str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 5, "stop_token": "x", "add_bos_token": True}, {"thinking": {"type": "x"}}],
)
def test_settings_with_harmless_names_are_taken(options):
    assert JudgeSettings(kind="openai", parameters=options).parameters == options


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"votes": 2}, "odd"),
        ({"max_usd": 1.0}, "needs `prices`"),
        ({"parameters": {"messages": []}}, "cannot hold `messages`"),
        ({"base_url": "ftp://example.org"}, "http"),
        ({"concurrency": 0}, "greater than or equal to 1"),
        ({"kind": "rules", "model": "x"}, "belongs to `kind: openai`"),
    ],
)
def test_settings_that_make_no_sense(broken, message):
    with pytest.raises(ValidationError, match=message):
        JudgeSettings(**{"kind": "openai", **broken})


def test_the_section_of_the_rule_judge_is_one_word():
    assert JudgeSettings().model_dump() == {"kind": "rules"}
    asked = JudgeSettings(kind="openai", votes=3)
    assert JudgeSettings(**asked.model_dump()) == asked


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"kind": "local"}, "needs `model`"),
        ({"kind": "local", "model": "m", "votes": 3}, "`votes` belongs to `kind: openai`"),
        ({"kind": "local", "model": "base", "revision": "c" * 40}, "recipe's own"),
        ({"kind": "local", "model": "m", "format": "other"}, "format"),
        ({"kind": "openai", "format": "labels"}, "`format` belongs to `kind: local`"),
        ({"kind": "rules", "revision": "c" * 40}, "`revision` belongs to `kind: local`"),
    ],
)
def test_settings_of_a_local_judge_that_make_no_sense(broken, message):
    with pytest.raises(ValidationError, match=message):
        JudgeSettings(**broken)


def test_the_section_of_a_local_judge_has_its_own_keys():
    local = JudgeSettings(kind="local", model="org/m")
    assert local.model_dump() == {
        "kind": "local",
        "model": "org/m",
        "revision": None,
        "format": "auto",
    }
    assert JudgeSettings(**local.model_dump()) == local
    assert not {"revision", "format"} & set(JudgeSettings(kind="openai").model_dump())
    assert JudgeSettings(kind="local", model="base").is_base
    assert not JudgeSettings(kind="openai", model="base").is_base


def test_the_folder_of_a_local_judge_is_relative_to_the_recipe(tmp_path):
    from abliterator.recipe import load_recipe

    (tmp_path / "guard").mkdir()
    path = tmp_path / "recipe.yaml"
    plain = {"model": "m", "layers": [1], "k": 1}
    path.write_text(json.dumps({**plain, "judge": {"kind": "local", "model": "guard"}}))
    recipe = load_recipe(path)
    assert recipe.judge.model == str(tmp_path / "guard")
    assert recipe.published()["judge"]["model"] == "guard"
    path.write_text(json.dumps({**plain, "judge": {"kind": "local", "model": "base"}}))
    assert load_recipe(path).judge.model == "base"


def test_openai_is_not_imported_by_the_room():
    code = "import sys, abliterator.judge, abliterator.pipeline; print('openai' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "False"
