"""The stage: which prompts it takes, what it refuses, what the plan says of it."""

import pytest

from abliterator import pipeline
from abliterator.errors import PromptError, RecipeError
from abliterator.pipeline import Options
from abliterator.pipeline.stages.prompts import PromptSets, set_apart
from abliterator.prompts import PromptSet
from abliterator.recipe import load_recipe
from tests.pipeline.test_pipeline import Log

FAST = Options(device="cpu", dtype="float32")


def prompt_set(name, n):
    return PromptSet(name=name, prompts=tuple(f"{name} {i}" for i in range(n)), source=name)


@pytest.mark.parametrize("own_contrast", [False, True])
def test_selection_takes_prompts_that_nothing_else_uses(own_contrast):
    from abliterator.recipe import Prompts, Source

    recipe = Prompts(
        target=Source(path="t.txt"), contrast=Source(path="c.txt") if own_contrast else None
    )
    sets = PromptSets(
        extraction={"target": prompt_set("target", 100), "contrast": prompt_set("contrast", 40)},
        evaluation={"target": prompt_set("evaluation", 9), "neutral": prompt_set("neutral", 40)},
    )
    found = set_apart(sets, recipe, prompts=16, seed=0)
    assert found.evaluation["target"].prompts == sets.evaluation["target"].prompts
    assert len(found.selection["target"].prompts) == 16
    assert len(found.selection["neutral"].prompts) == (16 if own_contrast else 10)
    parts = [
        s.prompts for p in (found.extraction, found.evaluation, found.selection) for s in p.values()
    ]
    everything = [prompt for prompts in parts for prompt in prompts]
    assert len(everything) == len(set(everything)) == 189
    assert PromptSets.model_validate_json(found.model_dump_json()) == found


# ---- the stage


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """A recipe with a sweep on a tiny random model, which refuses nothing."""
    (tmp_path / "t.txt").write_text("\n".join(f"Where is the {x}?" for x in "abcdefgh"))
    (tmp_path / "n.txt").write_text("\n".join(f"What is the {x}?" for x in "abcdefgh"))
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {tiny_folder()}\nlayers: sweep\nk: auto\nrollouts: {{max_new_tokens: 8}}\n"
        "prompts: {target: {path: t.txt}, neutral: {path: n.txt}}\n"
        "selection: {tokens: 3}\n"
    )
    return lambda *overrides: load_recipe(path, overrides=overrides)


def test_a_base_that_does_not_refuse(recipe, tmp_path):
    with pytest.raises(PromptError, match=r"refuses 0 of 2 held-out .* nothing to remove"):
        pipeline.build(recipe(), tmp_path / "out", options=FAST)
    assert not (tmp_path / "out" / "checkpoint").exists()
    log = Log()
    pipeline.run_stages(recipe(), tmp_path / "out", until="capture", options=FAST, progress=log)
    assert log.skipped == ["prompts", "capture"]  # what was captured is not lost


def test_the_plan_tells_what_a_selection_costs(recipe, tmp_path):
    summary = pipeline.plan_recipe(recipe("selection.prompts=10"), tmp_path / "out").summary()
    assert summary["layers"] == [1, 2]  # of three, less the last fifth
    assert summary["selection"] == {
        "candidates": 2,
        "every_position": 0,
        "judged": 2,
        "stacks": 2,
        "prompts": 10,
        "answers": 16 + 10 * (1 + 2 * 7) + 8 * 2 + 2,  # two on 8 prompts, one on 2 more
        "tokens": (16 + 10 * (1 + 2 * 7) + 8 * 2 + 2) * 3,
    }
    assert (
        pipeline.plan_recipe(recipe("layers=[1]", "k=1"), tmp_path).summary()["selection"] is None
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("edit.norm=column", "no run-time form"),
        ("k=3", "only 2 candidate layers of 3"),
        ("selection.stacks=[2, 3]", "begin with 1"),
        ("selection.max_kl=0", "selection.max_kl"),
    ],
)
def test_a_selection_that_cannot_be_made(recipe, tmp_path, override, says):
    with pytest.raises(RecipeError, match=says):
        pipeline.plan_recipe(recipe(override), tmp_path / "out")


def test_the_command_needs_something_to_choose(recipe, tmp_path):
    from click.testing import CliRunner

    from abliterator.cli import main

    recipe()
    args = ["sweep", str(tmp_path / "tiny.yaml"), "--set", "layers=[1]", "--set", "k=1"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 1
    assert "nothing to choose" in done.stderr
