"""What quantisation leaves of a build, measured once and shown as long as the build is the same."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from abliterator import pipeline
from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.errors import OutputError, QuantizationError, RecipeError
from abliterator.pipeline import SurvivalSettings, read_record
from abliterator.recipe import load_recipe
from abliterator.verification import verify
from tests.pipeline.builds import FAST, Log, build, write_project


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder):
    """(recipe, OUT) of one build; not to be written to."""
    folder = tmp_path_factory.mktemp("survive")
    recipe = write_project(folder, tiny_folder)
    build(recipe(), folder / "out")
    return recipe, folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    return Path(shutil.copytree(finished[1], tmp_path / "out"))


def survive(out, *formats, progress=None, **settings):
    """What was measured, and which stages ran."""
    log = progress or Log()
    asked = SurvivalSettings(formats, **settings)
    return pipeline.survive(out, asked, options=FAST, progress=log), log.ran


class Bars(Log):
    """Remembers the labels of bars; one whose label has `stop` in it is interrupted."""

    def __init__(self, stop=None):
        super().__init__()
        self.labels, self.stop = [], stop

    @contextmanager
    def bar(self, label, total):
        if self.stop and self.stop in label:
            raise KeyboardInterrupt
        self.labels.append(label)
        with super().bar(label, total) as advance:
            yield advance


def test_a_format_is_measured_once_and_shown_until_the_build_changes(finished, out):
    recipe = finished[0]
    before = read_record(out)
    (fp8,), ran = survive(out, "FP8")
    assert ran == ["survival-fp8", "record", "card"]
    assert fp8.built == before.behaviour["target"]
    assert fp8.behaviour.edited.truncated.n == fp8.change["base"].truncated.n == 2
    assert fp8.divergence.kl.value > 0
    assert 0 < fp8.rounding["edited"].kl.value < 0.1
    assert {part.component for part in fp8.strengths} == {"attention", "mlp"}
    assert all(part.leak_built < part.leak < 0.5 for part in fp8.strengths)
    assert fp8.bytes < fp8.bytes_built

    record = read_record(out)
    assert record.survival == (fp8,)
    assert record.model_copy(update={"survival": (), "provenance": before.provenance}) == before
    card = (out / "checkpoint" / "README.md").read_text()
    assert "## What quantisation leaves" in card
    assert "`abliterator survive OUT --as fp8 --keep`" in card
    assert not (out / "work" / "survival" / "scratch").exists()

    assert survive(out, "fp8") == ((fp8,), [])
    assert build(recipe(), out)[1] == []
    changed, _ = build(
        recipe("edit.strength=0.5"),
        out,
        pipeline.Options(device="cpu", dtype="float32", force=True),
    )
    assert changed.survival == ()
    assert "## What quantisation leaves" not in (out / "checkpoint" / "README.md").read_text()


def test_verify_accepts_the_card(finished, out):
    survive(out, "fp8")
    found = verify(finished[1].parent / "base", out / "checkpoint")
    assert found.faults == ()
    assert found.foreign == ()


def test_fewer_prompts_are_another_measurement(out):
    (one,), _ = survive(out, "fp8", limit=1)
    assert one.built.edited.truncated.n == one.behaviour.base.truncated.n == 1
    (all_of_them,), ran = survive(out, "fp8")
    assert all_of_them.behaviour.base.truncated.n == 2
    assert ran == ["survival-fp8", "record", "card"]


def test_answers_of_an_interrupted_run_are_kept(out):
    with pytest.raises(KeyboardInterrupt):
        survive(out, "fp8", progress=Bars("answers, edited"))
    assert not (out / "work" / "survival" / "scratch").exists()
    bars = Bars()
    (again,), _ = survive(out, "fp8", progress=bars)
    assert [label for label in bars.labels if "answers" in label] == ["fp8 answers, edited"]
    shutil.rmtree(out / "work" / "survival")
    assert survive(out, "fp8")[0] == (again,)


def test_kept_files_are_a_checkpoint_of_the_format(out):
    survive(out, "fp8", limit=1, keep=True)
    for side in ("base", "edited"):
        folder = out / "work" / "survival" / "files" / "fp8" / side
        stored = {info.dtype for info in Checkpoint.open(folder).tensors.values()}
        assert "F8_E4M3" in stored


def test_what_is_not_a_finished_build_is_an_error(finished, tmp_path, out):
    with pytest.raises(OutputError, match="not a folder that `abliterator build` made"):
        survive(tmp_path, "fp8")
    (out / "work" / "stages" / "judge.json").unlink()
    with pytest.raises(OutputError, match="its stage `judge` is missing"):
        survive(out, "fp8")


def test_what_cannot_be_made_is_an_error_before_any_work(out, monkeypatch, tmp_path):
    with pytest.raises(RecipeError, match="did you mean fp8"):
        survive(out, "fp9")
    with pytest.raises(QuantizationError, match="int4 has one scale for 32 columns or more"):
        survive(out, "fp8", "int4")
    with pytest.raises(QuantizationError, match="llama-server is not in"):
        survive(out, "fp8", "Q8_0", llama_cpp=tmp_path)
    monkeypatch.setattr(
        "abliterator.pipeline._survival._command.free_bytes", lambda folder: 1 << 20
    )
    with pytest.raises(OutputError, match=r"0\.0 GB free\. Make room"):
        survive(out, "fp8")
    assert not (out / "work" / "survival").exists()


def test_the_command_prints_a_table_or_json(out):
    arguments = ["survive", str(out), "--as", "fp8", "--device", "cpu", "--dtype", "float32"]
    done = CliRunner().invoke(main, ["--quiet", *arguments])
    assert done.exit_code == 0, done.output
    first = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert first == ["size,", "base", "as", "fp8", "component", "fp8", "fp8"]
    plain = CliRunner().invoke(main, ["--quiet", *arguments, "--json"])
    (entry,) = json.loads(plain.stdout)
    assert entry["format"] == "fp8"


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no llama.cpp")
def test_llama_cpp_makes_and_answers(smollm2_folder, tmp_path):
    """The whole way of a GGUF format with the real programs and a real model."""
    for name, text in {"t": "Set an alarm for {} hours.", "n": "Name {} colours."}.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(map(text.format, range(2, 10))))
    (tmp_path / "r.yaml").write_text(
        f"model: {smollm2_folder}\nlayers: [20]\nk: 1\nrollouts: {{max_new_tokens: 8}}\n"
        "prompts: {target: {path: t.txt}, neutral: {path: n.txt}}\n"
    )
    out = tmp_path / "out"
    build(load_recipe(tmp_path / "r.yaml"), out)
    (q8,), _ = survive(out, "Q8_0", llama_cpp=Path(os.environ["LLAMA_CPP"]))
    assert q8.withheld is None
    assert q8.rounding["base"].kl.value < 0.01
    assert all(abs(part.median - part.built) < 0.02 for part in q8.strengths)
