"""Estimators, protected sets and maps, from a recipe to the subspace of a tiny model."""

import json

import pytest
import torch
from safetensors.torch import load_file

from abliterator import pipeline
from abliterator.capture import load_moments
from abliterator.directions import Cleaning, Observations, estimate, map_directions
from abliterator.errors import PromptError, RecipeError
from abliterator.pipeline import Options
from abliterator.pipeline.stages.prompts import PromptSets
from abliterator.recipe import Prompts, load_recipe
from abliterator.record import DirectionChecks
from abliterator.subspace import orthonormal_basis
from tests.pipeline.builds import Log

FAST = Options(device="cpu", dtype="float32")
WORDS = [f"{a}{b}" for a in "abcd" for b in "efgh"]
PROTECT = "prompts.protect={code: {path: code.txt}, french: {path: french.txt}}"


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """A recipe on a tiny random model, with two more sets beside its target and neutral ones."""
    texts = {
        "t": "Where is the {} now?",
        "n": "Name {}.",
        "code": "def {}(): return 1",
        "french": "Qui a vu le {} ?",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(text.format(word) for word in WORDS))
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {tiny_folder()}\nlayers: [2, 1]\nk: 1\nrollouts: {{max_new_tokens: 3}}\n"
        "prompts: {target: {path: t.txt}, neutral: {path: n.txt}}\n"
    )
    return lambda *overrides: load_recipe(path, overrides=overrides)


@pytest.fixture
def at_tmp(tmp_path, monkeypatch):
    """Paths of overrides are relative to the working folder."""
    monkeypatch.chdir(tmp_path)


def made(recipe, out, until="directions"):
    log = Log()
    pipeline.run_stages(recipe, out, until=until, options=FAST, progress=log)
    return out / "work", log.ran


def observations(work):
    stored, moments = (
        load_file(work / "vectors.safetensors"),
        load_moments(work / "moments.safetensors"),
    )
    return Observations(
        moments["target"],
        moments["contrast"],
        protected={n.removeprefix("protect."): m for n, m in moments.items() if "protect." in n},
        vectors={name.removesuffix("@-1"): vectors for name, vectors in stored.items()},
    )


@pytest.mark.parametrize("name", ["whitened", "logistic"])
def test_an_estimator_reads_the_vectors_of_every_prompt(recipe, tmp_path, name):
    work, _ = made(recipe(f"directions.estimator={name}"), tmp_path / "out")
    observed = observations(work)
    sets = PromptSets.model_validate_json((work / "prompts.json").read_text()).extraction
    for kind, moments in (("target", observed.target), ("contrast", observed.contrast)):
        vectors = observed.vectors[kind]
        assert vectors.shape == (len(sets[kind].prompts), 3, 32)
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.double().mean(dim=0), moments.mean)
    found = load_file(work / "directions.safetensors")
    wanted = estimate(name, observed)
    assert torch.equal(found["directions"], wanted.vectors)
    assert torch.equal(found["subspace"], orthonormal_basis(wanted.vectors[1:2]))
    plain = estimate("mean_difference", observed).vectors
    assert torch.cosine_similarity(found["directions"], plain).max() < 0.999


def test_a_capture_with_vectors_serves_both_estimators_and_one_without_serves_neither(
    recipe, tmp_path
):
    out = tmp_path / "out"
    work, _ = made(recipe(), out)
    assert not (work / "vectors.safetensors").exists()
    assert not (work / "direction_checks.json").exists()

    def again(*overrides):
        options = Options(device="cpu", dtype="float32", force=True)
        log = Log()
        pipeline.run_stages(
            recipe(*overrides), out, until="directions", options=options, progress=log
        )
        return log.ran

    assert again("directions.estimator=whitened") == ["capture", "directions"]
    assert again("directions.estimator=logistic") == ["directions"]
    assert again() == ["capture", "directions"]


def test_protected_sets_are_removed_and_what_is_left_of_them_is_recorded(recipe, tmp_path, at_tmp):
    work, _ = made(recipe(PROTECT, "directions.ridge=0"), tmp_path / "out")
    moments = load_moments(work / "moments.safetensors")
    assert set(moments) == {"target", "contrast", "protect.code", "protect.french"}
    found = load_file(work / "directions.safetensors")["directions"]
    checks = DirectionChecks.model_validate_json((work / "direction_checks.json").read_text())
    assert [s.name for s in checks.protected] == ["code", "french"]
    for checked in checks.protected:
        direction = moments[f"protect.{checked.name}"].mean - moments["contrast"].mean
        cosines = torch.cosine_similarity(found, direction)
        assert cosines.abs().max() < 1e-9
        assert checked.prompts == len(WORDS)
        plain = moments["target"].mean - moments["contrast"].mean
        before = torch.cosine_similarity(plain, direction).abs()
        assert checked.before == pytest.approx(before.tolist(), abs=1e-6)
        assert max(checked.protected) == 0 < min(checked.left_out)
    assert checks.harmfulness_cosine == ()


def test_a_contrast_of_its_own_leaves_the_neutral_mean_to_be_compared_with(
    recipe, tmp_path, at_tmp
):
    (tmp_path / "c.txt").write_text("\n".join(f"What is the {word} now?" for word in WORDS))
    own = ("prompts.contrast={path: c.txt}", PROTECT)
    work, _ = made(recipe(*own, "directions.ridge=0"), tmp_path / "out")
    moments = load_moments(work / "moments.safetensors")
    assert {"contrast", "neutral", "protect.code"} <= set(moments)
    found = load_file(work / "directions.safetensors")["directions"]
    direction = moments["protect.code"].mean - moments["neutral"].mean
    assert torch.cosine_similarity(found, direction).abs().max() < 1e-9


def test_prompts_that_are_measured_on_are_not_protected_with(recipe, tmp_path, at_tmp):
    (tmp_path / "mixed.txt").write_text(
        "\n".join([*(f"Name {word}." for word in WORDS), "Sing.", "Dance."])
    )
    work, _ = made(
        recipe("prompts.protect={mixed: {path: mixed.txt}}"), tmp_path / "out", "prompts"
    )
    sets = PromptSets.model_validate_json((work / "prompts.json").read_text())
    left = set(sets.extraction["protect.mixed"].prompts)
    assert {"Sing.", "Dance."} < left
    assert left.isdisjoint(sets.evaluation["neutral"].prompts)
    assert sets.evaluation["neutral"].prompts
    with pytest.raises(PromptError, match=r"target prompts .* protect.same prompts .* the same"):
        made(recipe("prompts.protect={same: {path: t.txt}}"), tmp_path / "other", "prompts")


def test_the_nodes_of_a_map_are_stacked(recipe, tmp_path, at_tmp):
    settings = ("directions.stack=som", "directions.grid=[2, 2]", "k=3", PROTECT)
    work, _ = made(recipe(*settings), tmp_path / "out")
    observed = observations(work)
    assert set(observed.vectors) == {"target"}
    nodes = map_directions(observed, 2, grid=(2, 2), cleaning=Cleaning())
    found = load_file(work / "directions.safetensors")
    assert torch.equal(found["subspace"], orthonormal_basis(nodes[:3]))
    assert torch.equal(found["directions"], estimate("mean_difference", observed).vectors)
    checks = json.loads((work / "direction_checks.json").read_text())
    assert {s["name"] for s in checks["protected"]} == {"code", "french"}


def test_the_edit_of_a_map_is_baked(recipe, tmp_path):
    settings = ("directions.stack=som", "directions.grid=[1, 2]", "k=2")
    out = tmp_path / "out"
    made(recipe(*settings), out, "bake")
    edits = json.loads((out / "checkpoint" / "abliterator" / "edits.json").read_text())
    assert {edit["k"] for edit in edits} == {2}
    assert max(edit["leak"] for edit in edits) < 1e-3


def test_the_plan_says_what_is_stored(recipe, tmp_path):
    plan = pipeline.plan_recipe(recipe("directions.estimator=logistic"), tmp_path / "out")
    (note,) = (n for n in plan.notes if "vectors.safetensors" in n)
    assert "`estimator: logistic` reads the activations of single prompts: 0.00038 MB" in note
    plain = pipeline.plan_recipe(recipe(), tmp_path / "out")
    assert not any("vectors.safetensors" in n for n in plain.notes)


def test_the_plan_of_nodes_that_are_chosen(recipe, tmp_path):
    settings = ("directions.stack=som", "k=auto", "selection.rungs=[]", "selection.stacks=[1, 2]")
    selection = pipeline.plan_recipe(recipe(*settings), tmp_path / "out").selection
    assert selection["candidates"] == selection["nodes"] == 16
    assert (selection["judged"], selection["stacks"]) == (8, 2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["directions.stack=som", "directions.estimator=logistic"], "directions of its own"),
        (
            ["directions.stack=som", "directions.grid=[1, 2]", "k=3"],
            "`directions.grid` has 2 nodes",
        ),
        (
            ["directions.stack=within_layer", "prompts.contrast={path: c.txt}", PROTECT],
            "paired differences as they are: leave out `prompts.protect`",
        ),
        (["prompts.protect={a/b: {path: c.txt}}"], "a/b"),
        (["directions.ridge=-1"], "greater than or equal to 0"),
    ],
)
def test_settings_that_do_not_fit(recipe, settings, says):
    with pytest.raises(RecipeError, match=says):
        recipe(*settings)


def test_recipes_of_before_have_the_same_form(recipe, at_tmp):
    plain = recipe()
    published = plain.published()
    assert "protect" not in published["prompts"]
    assert not {"ridge", "grid"} & set(published["directions"])
    protected = recipe(PROTECT, "directions.ridge=0.5")
    assert protected.digest != plain.digest
    assert protected.published()["prompts"]["protect"]["code"]["path"] == "code.txt"
    assert protected.published()["directions"]["ridge"] == 0.5
    assert type(protected).model_validate(protected.model_dump()) == protected


def test_sets_of_any_name_are_pinned_and_found(recipe, at_tmp):
    named = "prompts.protect={path: {path: code.txt}, target: {dataset: some/set}}"
    prompts = recipe(named).prompts
    assert set(prompts.sources) == {"target", "neutral", "protect.path", "protect.target"}
    changed = prompts.with_sources(
        {n: s.model_copy(update={"limit": 3}) for n, s in prompts.sources.items()}
    )
    assert isinstance(changed, Prompts)
    assert {s.limit for s in changed.sources.values()} == {3}
    assert prompts.target.limit is None
