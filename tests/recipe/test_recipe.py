import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterator.errors import RecipeError
from abliterator.recipe import Edit, Recipe, load_edit, load_recipe, ranges_of
from abliterator.recipe._edit import blocks_of

THREE_LINES = "model: somebody/model-1b-it\nlayers: [9, 10, 7]\nk: 2\n"


@pytest.fixture
def recipe(tmp_path):
    def load(text: str = THREE_LINES, *overrides: str):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return load_recipe(path, overrides=overrides)

    return load


def test_three_lines_are_a_whole_recipe(recipe):
    found = recipe()
    assert (found.model, found.layers, found.k) == ("somebody/model-1b-it", (9, 10, 7), 2)
    assert found.edit.strength == {"attention": 1.0, "mlp": 1.0}
    assert found.prompts.evaluation is not None  # the default target set has a test split
    assert found.prompts.evaluation.split == "test"


def test_a_target_of_ones_own_is_not_evaluated_on_the_default_set(recipe):
    found = recipe(THREE_LINES + "prompts: {target: {path: mine.txt}}")
    assert found.prompts.evaluation is None


def test_one_strength_is_for_every_component(recipe):
    assert recipe(THREE_LINES + "edit: {strength: 0.5}").edit.strength == {
        "attention": 0.5,
        "mlp": 0.5,
    }


def test_a_strength_per_component(recipe):
    found = recipe(THREE_LINES + "edit: {strength: {attention: 1}}")
    assert found.edit.strength == {"attention": 1}


def test_experts_of_every_block_and_of_some(recipe):
    assert recipe(THREE_LINES).edit.experts == "all"
    assert recipe(THREE_LINES + "edit: {experts: [0, 7]}").edit.experts == (0, 7)
    found = recipe(THREE_LINES + "edit: {experts: {3-5: [0, 7], 9: all}}")
    assert found.edit.experts == {"3-5": (0, 7), "9": "all"}


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        ("some", "must be 'all' or a list or a mapping"),
        ("[]", "at least 1"),
        ("[1, 1]", "names an expert twice"),
        ("[-1]", "greater than or equal to 0"),
        ("{1-2: [1], 2: [0]}", "names block 2 twice"),
        ("{first: [1]}", "names no blocks"),
    ],
)
def test_experts_that_are_none(recipe, experts, says):
    with pytest.raises(RecipeError, match=says):
        recipe(THREE_LINES + f"edit: {{experts: {experts}}}")


def test_a_strength_per_blocks(recipe):
    text = THREE_LINES + "edit: {strength: {attention: 1, mlp: {1-8: 0, 9: 0.3, 10-24: 0.6}}}"
    mlp = {"1-8": 0, "9": 0.3, "10-24": 0.6}
    assert recipe(text).edit.strength == {"attention": 1, "mlp": mlp}
    found = recipe(text, "edit.strength.mlp.9=0.5", "edit.strength.mlp.25-29=1")
    assert found.edit.strength["mlp"] == mlp | {"9": 0.5, "25-29": 1}
    assert found.digest != recipe(text).digest
    assert Recipe.model_validate(found.published()) == found


@pytest.mark.parametrize(("key", "blocks"), [("9", [9]), ("0-2", [0, 1, 2]), ("3-3", [3])])
def test_blocks_have_both_ends(key, blocks):
    assert list(blocks_of(key)) == blocks


@given(st.dictionaries(st.integers(0, 12), st.sampled_from([0.0, 0.5, 1.0])))
def test_ranges_name_each_block_once_with_its_value(by_block):
    ranges = ranges_of(by_block)
    named = [(block, value) for key, value in ranges.items() for block in blocks_of(key)]
    assert named == sorted(by_block.items())
    first = [b for b in by_block if by_block.get(b - 1) != by_block[b]]
    assert len(ranges) == len(first)  # no two that could be one


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("k: 0", "`k` must be greater than or equal to 1"),
        ("k: two", "`k` must be a valid integer or 'auto'"),
        ("k: 3.0", "`k` must be a valid integer"),
        ("k: true", "`k` must be a valid integer"),
        ("k: 4", "k is 4, but only 3 layers"),
        ("layers: []", "no layer is given"),
        ("layers: [1, 1, 2]", "given twice"),
        ("layers: [0, 1, 2]", "`layers.0` must be greater"),
        ("layers: all", "`layers` must be a list or 'sweep'"),
        ("layer: [1]", r"`layer` is not a key of the recipe \(did you mean `layers`\?\)"),
        ("edit: {strength: 3}", "less than or equal to 2"),
        ("edit: {strength: .nan}", "`edit.strength"),
        ("edit: {strength: 0}", "nothing would be edited"),
        ("edit: {strength: {mlp: {1-8: 1, 8-9: 1}}}", "`edit.strength` gives `mlp` two .* block 8"),
        ("edit: {strength: {mlp: {9: 1, 9-9: 1}}}", "two strengths in block 9"),
        ("edit: {strength: {mlp: {8-1: 1}}}", "`edit.strength` names no blocks with '8-1'"),
        ("edit: {strength: {mlp: {all: 1}}}", "names no blocks with 'all'"),
        ("edit: {strength: {mlp: {-1: 1}}}", "names no blocks with '-1'"),
        ("edit: {strength: {mlp: {1-8: 3}}}", "1 problem:\n.*`edit.strength.mlp.1-8` must be less"),
        ("edit: {strength: {mlp: {1-8: 0}}}", "nothing would be edited"),
        ("edit: {strength: {mlp: x}}", "`edit.strength.mlp` must be a valid number or a mapping"),
        ("edit: {quantized: int8}", "`edit.quantized` must be 'auto', 'keep' or 'dequantize'"),
        ("edit: {norm: row}", "`edit.norm` must be 'none' or 'column'"),
        ("edit: {strenght: 1}", "did you mean `strength`"),
        ("edit: 3", "`edit` must be a mapping"),
        ("rollouts: {max_new_tokens: 0}", "`rollouts.max_new_tokens`"),
        ("rollouts: {batch_size: many}", "`rollouts.batch_size`"),
        (
            "benchmarks: {engine: {options: {trust_remote_code: true, pretrained: a/b}}}",
            "`options` cannot set pretrained, trust_remote_code",
        ),
        ("prompts: {target: {}}", "either `path` or `dataset`"),
        ("prompts: {target: {path: a.txt, split: train}}", "belong to a `dataset`"),
        ("prompts: {holdout: 1.0}", "`prompts.holdout`"),
        ("model: ''", "`model`"),
        ("model:", "`model` must be a valid string"),
        ("directions: {position: 0}", "`directions.position`"),
        ("seed: -1", "`seed`"),
    ],
)
def test_bad_values_are_named(recipe, change, says):
    key = change.split(":")[0]
    kept = [line for line in THREE_LINES.splitlines() if not line.startswith(f"{key}:")]
    with pytest.raises(RecipeError, match=says):
        recipe("\n".join([*kept, change]))


def test_everything_wrong_is_reported_together_with_its_line(recipe):
    text = "model: a/b\nlayers: [1]\nk: 1\nk: 1\nedit:\n  norm: row\n  strenght: 1\nseed: x\n"
    with pytest.raises(RecipeError) as caught:
        recipe(text)
    told = str(caught.value)
    assert "4 problems" in told
    for line in ("line 4: `k` is given twice", "line 6: `edit.norm`", "line 7: `edit.strenght`"):
        assert line in told
    assert "line 8: `seed`" in told


def test_missing_keys_are_named(recipe):
    with pytest.raises(RecipeError, match=r"`layers` is missing"):
        recipe("model: a/b\nk: 1\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "`model` is missing"),
        ("- a\n- b\n", "mapping"),
        ("just words", "mapping"),
        ("model: [unclosed\n", "not valid yaml"),
        ("model: !!python/object/apply:os.system ['true']\n", "line 1 has a yaml tag"),
        ("a: &x 1\nb: *x\n", "alias"),
        ("\tmodel: x", "not valid yaml"),
        ("model: 2020-99-99\n", "`layers` is missing"),
        ("? [a]\n: b\n", "line 1 has a key that is no text"),
        ("[" * 3000, "yaml|nested"),
    ],
)
def test_files_that_are_no_recipe(recipe, text, says):
    with pytest.raises(RecipeError, match=says):
        recipe(text)


def test_a_recipe_that_is_not_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="Cannot read"):
        load_recipe(tmp_path / "missing.yaml")


# ---- overrides


def test_overrides_win(recipe):
    found = recipe(THREE_LINES, "k=3", "edit.strength=0.5", "layers=[1, 2, 3]")
    assert (found.k, found.layers, found.edit.strength["mlp"]) == (3, (1, 2, 3), 0.5)


def test_an_override_of_a_path_replaces_the_dataset(recipe):
    text = THREE_LINES + "prompts: {target: {dataset: a/b, split: test, limit: 7}}"
    found = recipe(text, "prompts.target.path=mine.txt").prompts.target
    assert (found.path.name, found.dataset, found.split, found.limit) == ("mine.txt", None, None, 7)


@pytest.mark.parametrize("override", ["k", "=3", "a..b=1", "k=[", "nonsense.x=1", "k.x=1"])
def test_bad_overrides(recipe, override):
    with pytest.raises(RecipeError):
        recipe(THREE_LINES, override)


def test_paths_are_relative_to_the_recipe_and_overrides_to_the_working_folder(
    recipe, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = THREE_LINES + "prompts: {target: {path: sub/t.txt}}\nbenchmarks: {tasks: [x.yaml, arc]}"
    found = recipe(text, "prompts.neutral.path=n.txt")
    assert found.prompts.target.path == tmp_path / "sub" / "t.txt"
    assert found.prompts.neutral.path == tmp_path / "elsewhere" / "n.txt"
    assert found.benchmarks.tasks == (str(tmp_path / "x.yaml"), "arc")


def test_a_model_folder_beside_the_recipe_is_local(recipe, tmp_path):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    local = recipe(THREE_LINES.replace("somebody/model-1b-it", "models/mine"))
    assert local.model == str(tmp_path / "models" / "mine")
    assert recipe().model == "somebody/model-1b-it"


def test_the_edit_section_alone():
    assert load_edit(["edit.strength=0.5"]).strength["mlp"] == 0.5
    assert load_edit([]) == Edit()
    with pytest.raises(RecipeError, match="rounding"):
        load_edit(["edit.rounding=up"])
    with pytest.raises(RecipeError, match="Only `edit`"):
        load_edit(["k=3"])


# ---- digest


def test_the_digest_knows_what_matters_and_not_where_files_lie(recipe, tmp_path):
    text = THREE_LINES + "prompts: {target: {path: t.txt}}"
    first = recipe(text).digest
    assert recipe(text).digest == first
    assert recipe(text, f"prompts.target.path={tmp_path}/other/t.txt").digest == first
    assert recipe(text, "k=1").digest != first
    assert recipe(text, "prompts.target.path=u.txt").digest != first


def test_the_published_form_shows_no_folder(recipe, tmp_path):
    text = THREE_LINES + "prompts: {target: {path: t.txt}}\nbenchmarks: {tasks: [x.yaml]}"
    assert str(tmp_path) not in str(recipe(text).published())


def test_a_recipe_is_frozen(recipe):
    with pytest.raises(ValueError, match="frozen"):
        recipe().k = 3


def test_a_benchmarks_section_without_tasks_means_those_of_the_replication(tmp_path):
    path = tmp_path / "recipe.yaml"

    def benchmarks(section):
        path.write_text("model: m\nlayers: [1]\nk: 1\n" + section)
        return load_recipe(path).benchmarks

    assert (benchmarks("").preset, benchmarks("").tasks) == (None, ())
    assert benchmarks("benchmarks: {limit: 50}\n").preset == "replication"
    assert benchmarks("benchmarks: {tasks: [piqa]}\n").preset is None
    assert benchmarks("benchmarks: {tasks: []}\n").preset is None
    kept = load_recipe(path).model_dump(mode="json")["benchmarks"]
    assert (kept["preset"], kept["tasks"]) == (None, [])  # as a resolved recipe is read again


def test_the_old_name_of_the_replications_preset_says_the_new_one(recipe):
    with pytest.raises(RecipeError, match=r"`benchmarks.preset` has a new name.*`replication`"):
        recipe(THREE_LINES + "benchmarks: {preset: seed}")
