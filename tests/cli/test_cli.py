import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from abliterator import pipeline
from abliterator.cli import main
from tests.pipeline.test_pipeline import ALL


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: object):
        return CliRunner().invoke(main, [str(a) for a in arguments])

    return invoke


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    (tmp_path / "t.txt").write_text("\n".join(f"Where is the {x}?" for x in "abcdefgh"))
    (tmp_path / "n.txt").write_text("\n".join(f"What is the {x}?" for x in "abcdefgh"))
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {tiny_folder()}\nlayers: [2]\nk: 1\n"
        "prompts: {target: {path: t.txt}, neutral: {path: n.txt}}\n"
        "rollouts: {max_new_tokens: 3}\n"
    )
    return path


def test_build_prints_base_and_edited_side_by_side(run, recipe, tmp_path):
    done = run("build", recipe, "--details")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("out/tiny/checkpoint: 6 tensors edited, k = 1, leak at most")
    assert lines[1].split() == ["base", "edited", "delta"]
    assert any(line.startswith("target refusal") for line in lines)
    assert lines[-1] == "judged by: rule judge"
    assert "capture" in done.stderr
    assert (tmp_path / "out" / "tiny" / "checkpoint" / "README.md").is_file()


@pytest.mark.parametrize("columns", [80, 120])
def test_build_ends_with_a_few_lines_and_what_to_do_next(run, recipe, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    done = run("build", recipe, "--set", "edit.strength=0.5")
    assert done.exit_code == 0, done.stderr
    result, example, commands = done.stdout.rsplit("\n\n", 2)
    header, blank, *lines = result.splitlines()
    assert (header.split()[0], blank) == ("out/tiny/checkpoint", "")
    names = ["refusal", "compliance", "coherence", "neutral", "KL", "edit", "unscored"]
    assert [line.split()[0] for line in lines[:7]] == names
    assert "strengths as asked, within" in lines[5]
    assert max(map(len, [*lines, *example.splitlines()])) <= columns
    assert [line.split()[0] for line in example.splitlines()[1:]] == ["base", "edited"]
    named = [line.split()[2] for line in commands.splitlines() if " abliterator " in line]
    assert {"chat", "verify", "publish"} <= set(named) <= set(main.commands)


def test_build_json_is_the_record(run, recipe, tmp_path):
    done = run("build", recipe, "--out", "o", "--json")
    path = tmp_path / "o" / "checkpoint" / "abliterator" / "record.json"
    assert json.loads(done.stdout) == json.loads(path.read_text())


def test_stages_one_by_one_then_build_skips_them(run, recipe):
    for stage in ("directions", "bake", "rollouts", "judge", "benchmarks", "card"):
        done = run(stage, recipe, "--out", "o")
        assert done.exit_code == 0, (stage, done.stderr)
    done = run("build", "o")  # the folder of an earlier run is enough
    assert done.stderr.count("(done before)") == len(ALL)


def test_sets_reach_the_recipe(run, recipe, tmp_path):
    done = run("build", recipe, "--out", "o", "--set", "layers=[3, 1]", "--set", "k=2", "--json")
    assert json.loads(done.stdout)["edit"]["layers"] == [3, 1]


def test_plan_tells_what_will_be_touched(run, recipe, tiny_folder):
    plain = run("plan", recipe)
    assert plain.exit_code == 0, plain.stderr
    assert "3 attention, 3 mlp tensors" in plain.stdout
    told = json.loads(run("plan", tiny_folder(), "--json").stdout)
    assert told["edited_tensors"] == {"attention": 3, "mlp": 3}
    assert told["bytes"]["written"] > told["bytes"]["edited"] > 0
    assert "config.json" in told["files"]["carried"]


def test_plan_checks_layers(run, recipe):
    done = run("plan", recipe, "--set", "layers=[7]")
    assert done.exit_code == 1
    assert "layers 1 to 3" in done.stderr


def test_bake_without_a_recipe(run, tiny_folder, tmp_path):
    save_file({"subspace": torch.randn(32, 2)}, tmp_path / "Q.safetensors")
    arguments = ["bake", "--model", tiny_folder(), "--subspace", "Q.safetensors", "--out", "dir"]
    done = run(*arguments, "--set", "edit.strength=0.5", "--json")
    assert done.exit_code == 0, done.stderr
    edits = json.loads(done.stdout)
    assert len(edits) == 6
    assert edits[0]["strength"] == 0.5
    assert (tmp_path / "dir" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["bake"],
        ["bake", "--model", "x"],
        ["bake", "r.yaml", "--model", "x"],
        ["build"],
        ["build", "missing.yaml"],
        ["build", "r.yaml", "--dtype", "int8"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_2(run, tmp_path, arguments):
    (tmp_path / "r.yaml").write_text("")
    assert run(*arguments).exit_code == 2


def test_named_errors_are_one_paragraph_without_a_traceback(run, recipe, tmp_path):
    done = run("build", recipe, "--out", "o", "--set", "k=5")
    assert done.exit_code == 1
    assert done.stderr.startswith("RecipeError: tiny.yaml has 1 problem")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_a_bug_keeps_its_traceback(run, recipe, monkeypatch):

    monkeypatch.setattr(pipeline, "build", lambda *a, **k: 1 / 0)
    done = run("build", recipe)
    assert isinstance(done.exception, ZeroDivisionError)


def test_an_interrupt_exits_130(run, recipe, monkeypatch):

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "build", interrupt)
    done = run("build", recipe)
    assert done.exit_code == 130
    assert "goes on where" in done.stderr


def test_a_command_ends_without_a_last_collection():
    import subprocess
    import sys

    script = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
        "from abliterator.cli import main; main(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("True\n")


def test_python_dash_m():
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "abliterator", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("python -m abliterator, version 0.1.0")
