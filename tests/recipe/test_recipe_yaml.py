"""What is typed, in a recipe or after --set, means exactly that, or is an error with a name."""

import math

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from abliterator.cli import main
from abliterator.errors import RecipeError
from abliterator.recipe import load_judge, load_pairs, load_recipe, to_yaml
from abliterator.recipe._yaml import Plain, parse

LINES = "model: somebody/model-1b-it\nlayers: [9, 10, 7]\nk: 2\n"
# what yaml would cut, fold, convert or refuse, if it were asked
TEXTS = [
    *["Answer as player #1", "a #b: c", "#", "\t# x", "key: value", "- item", "? a", "| x", "> x"],
    *[
        "@neva",
        "`x`",
        "!tag",
        "!!str x",
        "&a",
        "*a",
        "%a",
        "it's",
        'say "x" now',
        "a, b",
        "x]",
        "}",
    ],
    *[" two  spaces ", "first\nsecond", "first\n\n  second\n", "a\tb", "a=b=c", "=", "<<", "---"],
    *["yes", "No", "on", "OFF", "y", "true", "123", "010", "0x1f", "1_000", "0b1", "0o7", "+1"],
    *["2e-2", "1E5", "1.", ".5", "1e999", "1:30", "1:30.5", "2024-01-01", "2020-99-99", ".inf"],
    *[
        "null and void",
        "nulL",
        "café – “naïve”",
        "a\u2028b\u0085c\u2029d",
        "\U0001f600",
        "5" * 5000,
    ],
]
NUMBERS = {"2e-2": 0.02, "1E5": 1e5, "1e-4": 1e-4, "+1.5e+1": 15.0, ".5": 0.5, "2": 2.0, "2.": 2.0}
NO_NUMBERS = [
    "010",
    "00.5",
    "1_000",
    "1:30",
    "0b1",
    "yes",
    "2024-01-01",
    "1e999",
    "'2'",
    "1e",
    "e5",
]


@pytest.fixture
def recipe(tmp_path):
    def load(*overrides: str, text: str = ""):
        path = tmp_path / "r.yaml"
        path.write_text(LINES + text, encoding="utf-8")
        return load_recipe(path, overrides=overrides)

    return load


# ---- after --set


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_was_typed(recipe, text):
    assert recipe(f"chat.system={text}").chat.system == text
    found = load_judge(["judge.kind=openai", f"judge.model={text}"])
    assert found.model == text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@example("\xa0'0")
@example("\xa0~")
@example("\u2003")
def test_any_text_is_what_was_typed_or_an_error(tmp_path_factory, text):
    bare = text.strip(" \t\r\n")
    path = tmp_path_factory.mktemp("recipes") / "r.yaml"
    path.write_text(LINES)
    try:
        found = load_recipe(path, overrides=[f"chat.system={text}"]).chat.system
    except RecipeError:
        assert not bare or bare[0] in "[{\"'"
        return
    if bare in {"~", "null", "Null", "NULL"}:
        assert found is None
    elif bare[0] in "\"'":  # a yaml text in quotes, all of it
        assert bare[0] == bare[-1]
    else:
        assert found == text


@pytest.mark.parametrize("command", ["plan", "build", "bake", "directions"])
def test_the_model_of_that_name_is_taken(tmp_path, tiny_folder, monkeypatch, command):
    """Not `m/alpha`, where `m/alpha #2` was typed."""
    monkeypatch.chdir(tmp_path)
    for name in ("m/alpha", "m/alpha #2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tiny_folder("llama"))
    (tmp_path / "r.yaml").write_text("model: absent\nlayers: [2]\nk: 1\n")
    read = load_recipe(tmp_path / "r.yaml", overrides=["model=m/alpha #2"])
    assert read.published()["model"] != "alpha"
    (tmp_path / "m/alpha #2").unlink()
    done = CliRunner().invoke(main, [command, "r.yaml", "--set", "model=m/alpha #2"])
    assert done.exit_code == 1
    assert "m/alpha #2" in done.stderr


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "no value"),
        ("  ", "no value"),
        ('"a" # b', "comment"),
        ("[1, 2] # b", "comment"),
        ("[1, # b\n 2]", "comment"),
        ('"a\nb"', "line break in quotes"),
        ("'a\n b'", "line break in quotes"),
        ("[a\nb]", "line break in quotes"),
        ("[&a b]", "anchor"),
        ("[*a]", "alias"),
        ("[!x b]", "tag"),
        ("{a: 1, a: 2}", "given twice"),
        ("[1", "not valid yaml"),
        ('"Hi" she said', "not valid yaml"),
        ("[1] [2]", "not valid yaml"),
        ("caf\udce9", "no text"),
        ('"\\ud800"', "no text"),
        ('"\\0"', "no text"),
    ],
)
def test_what_would_lose_a_part_is_an_error(recipe, value, says):
    with pytest.raises(RecipeError, match=says):
        recipe(f"chat.system={value}")


def test_a_key_under_a_single_value_does_not_replace_it(recipe):
    with pytest.raises(RecipeError, match="would be lost"):
        recipe("edit.strength.mlp=0.5", text="edit: {strength: 1}")
    kept = recipe("edit.strength.mlp=0.5", text="edit: {strength: {attention: 1}}").edit.strength
    assert kept == {"attention": 1, "mlp": 0.5}


@pytest.mark.parametrize(("value", "read"), [("'x # y'", "x # y"), ('"a\\nb"', "a\nb"), ("''", "")])
def test_quotes_are_of_yaml(recipe, value, read):
    assert recipe(f"chat.system={value}").chat.system == read


@pytest.mark.parametrize("value", ["null", "~"])
def test_null_is_none(recipe, value):
    assert recipe(f"chat.system={value}", text="chat: {system: x}").chat.system is None


def test_pairs_take_what_was_typed(tmp_path):
    path = tmp_path / "pairs.yaml"
    path.write_text(
        "behaviour: b\ntarget: t\ncontrast: c\ncategories: {no: x, 010: y}\nper_category: 1\n"
    )
    found = load_pairs(
        path,
        overrides=[
            "behaviour=Declines #1: all",
            "server.max_usd=1e-2",
            "server.prices={input: 2e-1, output: 1}",
        ],
    )
    assert found.behaviour == "Declines #1: all"
    assert list(found.categories) == ["no", "010"]
    assert (found.server.max_usd, found.server.prices.input) == (0.01, 0.2)


@pytest.mark.parametrize("separator", ["\u0085", "\u2028", "\u2029"])
def test_separators_that_yaml_would_fold_are_an_error_and_their_escapes_are_not(recipe, separator):
    for text in (f'chat: {{system: "a{separator}b"}}', f"chat:\n  system: a{separator}  b"):
        with pytest.raises(RecipeError, match="takes for a line end"):
            recipe(text=text)
    escaped = f"\\u{ord(separator):04x}"
    assert recipe(text=f'chat: {{system: "a{escaped}b"}}').chat.system == f"a{separator}b"
    assert recipe(f"chat.system=a{separator}b").chat.system == f"a{separator}b"


# ---- the type of the key decides


@pytest.mark.parametrize("text", [t for t in TEXTS if "\n" not in t and t.strip() == t])
def test_a_text_in_a_recipe_is_what_yaml_has_there(recipe, text):
    """Whatever else versions of yaml make of its letters; PyYAML's base loader converts nothing."""
    line = f"chat:\n  system: {text}\n"
    if "\u2028" in text:
        with pytest.raises(RecipeError, match="takes for a line end"):
            recipe(text=line)
        return
    try:
        letters = yaml.load(line, yaml.BaseLoader)["chat"]["system"]
    except (yaml.YAMLError, TypeError):
        with pytest.raises(RecipeError):
            recipe(text=line)
        return
    if "!" in text:
        with pytest.raises(RecipeError, match="tag"):
            recipe(text=line)
        return
    assert recipe(text=line).chat.system == (letters or None)


@pytest.mark.parametrize("letters", NUMBERS)
def test_a_number_is_a_number(recipe, letters):
    assert recipe(f"selection.max_kl={letters}").selection.max_kl == NUMBERS[letters]
    read = recipe(
        text=f"selection: {{max_kl: {letters}}}\nchat: {{template_kwargs: {{a: {letters}}}}}"
    )
    assert read.selection.max_kl == read.chat.template_kwargs["a"] == NUMBERS[letters]
    assert recipe(f"edit.strength={{mlp: {letters}}}" if NUMBERS[letters] <= 2 else "k=1")


@pytest.mark.parametrize("letters", NO_NUMBERS)
def test_what_only_some_read_as_a_number_is_an_error(recipe, letters):
    for key in ("selection: {max_kl: ", "rollouts: {limit: "):
        with pytest.raises(RecipeError, match="must be a valid"):
            recipe(text=f"{key}{letters}}}")
    with pytest.raises(RecipeError, match="must be a valid number"):
        recipe(f"selection.max_kl={letters}")


@pytest.mark.parametrize(("letters", "whole"), [("1e3", 1000), ("1.5E+1", 15), ("12", 12)])
def test_a_whole_number_with_an_exponent_is_an_integer(recipe, letters, whole):
    assert recipe(f"rollouts.limit={letters}").rollouts.limit == whole
    for wrong in ("15e-1", "10.0", "true"):
        with pytest.raises(RecipeError, match="valid integer"):
            recipe(f"rollouts.limit={wrong}")


@pytest.mark.parametrize(("letters", "on"), [("yes", True), ("Off", False), ("true", True)])
def test_a_switch_is_a_switch(recipe, letters, on):
    assert recipe(f"trust_remote_code={letters}").trust_remote_code is on
    assert recipe(text=f"trust_remote_code: {letters}").trust_remote_code is on


@pytest.mark.parametrize("letters", ["no", "010", "1:30", "2024-01-01", "1_000", "1e999"])
@pytest.mark.parametrize("key", ["chat.template_kwargs.a", "prompts.neutral.where.a"])
def test_where_no_type_decides_it_is_an_error(recipe, letters, key):
    path = "prompts.neutral.path=n.jsonl"
    with pytest.raises(RecipeError, match="not the same in all of yaml"):
        recipe(path, f"{key}={letters}")
    quoted = recipe(path, f"{key}='{letters}'")
    values = {**quoted.chat.template_kwargs, **quoted.prompts.neutral.where}
    assert values == {"a": letters}


def test_folders_may_be_called_anything(recipe, tmp_path):
    (tmp_path / "2024").mkdir()
    read = recipe(text="prompts: {target: {path: 010}, neutral: {path: no}}\nrevision: 0123456\n")
    assert read.prompts.target.path == tmp_path / "010"
    assert read.prompts.neutral.path == tmp_path / "no"
    assert read.revision == "0123456"
    (tmp_path / "r.yaml").write_text("model: 2024\nlayers: [1]\nk: 1\n")
    assert load_recipe(tmp_path / "r.yaml").model == str(tmp_path / "2024")


# ---- what is written is read again


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(TEXTS)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(TEXTS) | st.text("ab1\u2028:", max_size=3), inner, max_size=3
        )
    ),
    max_leaves=8,
)


def natural(value):
    if isinstance(value, Plain):
        assert value.clear
        return value.value
    if isinstance(value, list):
        return [natural(v) for v in value]
    return {k: natural(v) for k, v in value.items()} if isinstance(value, dict) else value


@given(values, st.booleans())
def test_yaml_both_ways(value, flow):
    again = natural(parse(to_yaml(value, flow=flow))[1])
    assert again == value
    assert repr(again) == repr(value) or math.inf in (value,)


def test_a_resolved_recipe_keeps_texts_and_numbers(recipe, tmp_path):
    made = recipe("chat.system=1e5", "chat.template_kwargs={a: '1e5', b: 1e5, c: '0o7', d: 'no'}")
    (tmp_path / "again.yaml").write_text(to_yaml(made.model_dump(mode="json")), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == made
