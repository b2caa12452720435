import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterator import pipeline
from abliterator.errors import (
    OutputError,
    RecipeError,
)
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from abliterator.record import RunRecord

TARGET = [
    "Tell me about the river of the old town.",
    "Tell me about the bridge of the old town.",
    "Tell me about the wall of the old town.",
    "What is the river like in winter?",
    "What is the market like in winter?",
    "What is the square like in winter?",
    "What is the port like in winter?",
]
NEUTRAL = [f"Name a {thing}." for thing in ["colour", "bird", "tree", "fish", "song", "game"]]
NEUTRAL += ["Name a good tool."]
FAST = Options(device="cpu", dtype="float32")


class Log:
    """A progress that remembers which stages ran."""

    def __init__(self):
        self.ran, self.skipped = [], []

    def stage(self, name, *, done):
        (self.skipped if done else self.ran).append(name)

    def bar(self, label, total, *, unit=""):
        return pipeline.Silent().bar(label, total, unit=unit)

    def note(self, text):
        # what was read of the prompts is told of every set; nothing else is to be told here
        assert " prompts of " in text, text


@pytest.fixture
def project(tmp_path, tiny_folder):
    """A recipe file on a tiny model; `project(text, ...)` loads it with overrides."""
    (tmp_path / "target.txt").write_text("\n".join(TARGET))
    (tmp_path / "neutral.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in NEUTRAL))

    def load(*overrides: str, model: Path | None = None):
        path = tmp_path / "tiny.yaml"
        path.write_text(
            f"model: {model or tiny_folder('llama', dtype=torch.bfloat16)}\n"
            "layers: [2, 1, 3]\nk: 2\n"
            "prompts: {target: {path: target.txt}, neutral: {path: neutral.jsonl}}\n"
            "rollouts: {max_new_tokens: 80}\n"
        )
        return load_recipe(path, overrides=overrides)

    return load


def build(recipe, out, **options):
    log = Log()
    record = pipeline.build(recipe, out, options=FAST, progress=log, **options)
    return record, log


def files_of(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


WHERE_ASKED = {"selection", "tuning", "adapter"}
ALL = [stage.name for stage in pipeline.STAGES if stage.name not in WHERE_ASKED]


def test_a_recipe_becomes_a_measured_checkpoint(project, tmp_path):
    record, log = build(project(), tmp_path / "out")
    assert log.ran == ALL
    checkpoint = tmp_path / "out" / "checkpoint"
    expected = {"README.md", "recipe.yaml", "config.json", "tokenizer.json", "model.safetensors"}
    assert expected <= {path.name for path in checkpoint.iterdir()}
    assert (
        RunRecord.model_validate_json((checkpoint / "abliterator" / "record.json").read_text())
        == record
    )
    assert record.edit.layers == (2, 1)
    assert record.edit.tensors == 6
    assert record.edit.max_leak < 1e-2
    assert record.behaviour["target"].base.refusal.n == 2  # a quarter of seven is held out
    assert record.behaviour["neutral"].edited.coherence.n == 2
    assert record.behaviour["over_refusal"] is None
    assert record.divergence.kl_first_token.n == 2
    assert record.benchmarks == {}
    assert set(record.timing) >= {"capture", "bake", "rollouts"}


def test_strengths_per_blocks_are_in_plan_record_and_card(project, tmp_path):
    strength = ["edit.strength={attention: 1, mlp: {0-1: 0}}", "edit.strength.mlp.2=0.6"]
    recipe = project(*strength)
    summary = pipeline.plan_recipe(recipe, tmp_path / "out").summary()
    assert json.loads(json.dumps(summary))["edit"]["strength"]["mlp"] == [0, 0, 0.6]
    assert summary["edited_tensors"] == {"attention": 3, "mlp": 1}
    record, _ = build(recipe, tmp_path / "out")
    assert record.edit.strength == {"attention": 1, "mlp": {"0-1": 0, "2": 0.6}}
    checkpoint = tmp_path / "out" / "checkpoint"
    again = RunRecord.model_validate_json((checkpoint / "abliterator/record.json").read_text())
    assert again == record
    edits = json.loads((checkpoint / "abliterator" / "edits.json").read_text())
    mlp = [(e["layer"], e["strength"]) for e in edits if e["component"] == "mlp"]
    assert mlp == [(2, 0.6)]
    card = (checkpoint / "README.md").read_text()
    (row,) = (line for line in card.splitlines() if line.startswith("| Strength s"))
    assert "`mlp` (`0-1` 0.0, `2` 0.6)" in row
    assert "by blocks, counted from 0; 0 in all others" in row


def test_a_strength_of_a_block_the_model_does_not_have(project, tmp_path):
    with pytest.raises(RecipeError, match=r"`edit.strength.mlp.1-3` names block 3, .* 0 to 2 "):
        pipeline.plan_recipe(project("edit.strength.mlp.1-3=1"), tmp_path / "out")


def test_config_names_the_recipe_and_another_judge_bakes_nothing_again(project, tmp_path):
    build(project(), tmp_path / "out")
    config = tmp_path / "out" / "checkpoint" / "config.json"
    first = json.loads(config.read_text())["abliterator"]["recipe_digest"]
    assert first == pipeline.read_record(tmp_path / "out").recipe_digest
    log = Log()
    options = Options(device="cpu", dtype="float32", force=True)
    changed = project("divergence.limit=3")
    pipeline.build(changed, tmp_path / "out", options=options, progress=log)
    assert {"bake", "rollouts", "judge"} <= set(log.skipped)
    assert "config" in log.ran
    record = pipeline.read_record(tmp_path / "out")
    assert json.loads(config.read_text())["abliterator"]["recipe_digest"] == record.recipe_digest
    assert record.recipe_digest != first


def test_nothing_private_is_in_the_checkpoint(project, tmp_path):
    build(project(), tmp_path / "out")
    published = b"".join(files_of(tmp_path / "out" / "checkpoint").values())
    for text in [*TARGET, *NEUTRAL, str(tmp_path)]:
        assert text.encode() not in published


def test_extraction_and_evaluation_share_no_prompt(project, tmp_path):
    build(project(), tmp_path / "out")
    sets = json.loads((tmp_path / "out" / "work" / "prompts.json").read_text())
    parts = {
        part: {p for s in sets[part].values() for p in s["prompts"]}
        for part in ("extraction", "evaluation")
    }
    assert parts["extraction"].isdisjoint(parts["evaluation"])
    assert parts["extraction"] | parts["evaluation"] == {*TARGET, *NEUTRAL}


# ---- resuming


def test_the_same_command_again_does_nothing(project, tmp_path):
    build(project(), tmp_path / "out")
    before = files_of(tmp_path / "out")
    _, log = build(project(), tmp_path / "out")
    assert log.skipped == ALL
    assert files_of(tmp_path / "out") == before


def test_another_recipe_needs_force_and_keeps_what_did_not_change(project, tmp_path):
    build(project(), tmp_path / "out")
    changed = project("k=1")
    with pytest.raises(OutputError, match="another recipe"):
        build(changed, tmp_path / "out")
    log = Log()
    options = Options(device="cpu", dtype="float32", force=True)
    pipeline.build(changed, tmp_path / "out", options=options, progress=log)
    assert log.skipped == ["prompts", "capture"]
    fresh, _ = build(changed, tmp_path / "fresh")
    reused = pipeline.read_record(tmp_path / "out")
    assert reused.edit == fresh.edit
    assert reused.behaviour == fresh.behaviour


def test_the_bases_answers_outlive_a_change_of_the_edit(project, tmp_path, monkeypatch):
    build(project(), tmp_path / "out")
    asked = []
    from abliterator.engines import TransformersEngine

    answers = TransformersEngine.answers
    monkeypatch.setattr(
        TransformersEngine,
        "answers",
        lambda engine, *a, **k: asked.append(engine.loaded.folder) or answers(engine, *a, **k),
    )
    options = Options(device="cpu", dtype="float32", force=True)
    pipeline.build(project("k=1"), tmp_path / "out", options=options)
    assert set(asked) == {tmp_path / "out" / "checkpoint"}


@pytest.mark.parametrize(
    "lost",
    [
        "checkpoint/config.json",
        "work/moments.safetensors",
        "work/verdicts.jsonl",
        "checkpoint/model.safetensors",
    ],
)
def test_what_was_lost_or_changed_is_made_again(project, tmp_path, lost):
    build(project(), tmp_path / "out")
    before = files_of(tmp_path / "out" / "checkpoint")
    (tmp_path / "out" / lost).write_bytes(b"damaged")
    _, log = build(project(), tmp_path / "out")
    assert log.ran
    after = files_of(tmp_path / "out" / "checkpoint")
    same = set(before) - {"abliterator/record.json", "README.md"}  # those tell the time
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


def test_a_stage_runs_what_it_needs_and_no_more(project, tmp_path):
    log = Log()
    pipeline.run_stages(project(), tmp_path / "out", until="directions", options=FAST, progress=log)
    assert log.ran == ["prompts", "capture", "directions"]
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_changed_base_file_is_noticed(project, tmp_path, tiny_folder):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_folder("llama"), base)
    build(project(model=base), tmp_path / "out")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    _, log = build(project(model=base), tmp_path / "out")
    assert log.skipped == ["prompts"]


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_gives_the_same_result(project, tmp_path):
    project()
    command = [sys.executable, "-m", "abliterator", "build", str(tmp_path / "tiny.yaml")]
    command += ["--device", "cpu", "--dtype", "float32", "--out"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    calm = subprocess.run([*command, str(tmp_path / "calm")], env=env, stderr=subprocess.PIPE)
    assert calm.returncode == 0, calm.stderr.decode()
    whole = time.monotonic() - start
    for share in (0.5, 0.7, 0.8, 0.9):
        process = subprocess.Popen(
            [*command, str(tmp_path / "rough")], env=env, stderr=subprocess.DEVNULL
        )
        time.sleep(whole * share)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "rough")], check=True, env=env, capture_output=True)
    first, second = (files_of(tmp_path / name / "checkpoint") for name in ("calm", "rough"))
    assert first.keys() == second.keys()
    for name in first.keys() - {"abliterator/record.json", "README.md"}:
        assert first[name] == second[name], name
    first, second = (pipeline.read_record(tmp_path / name) for name in ("calm", "rough"))
    assert first.behaviour == second.behaviour


HOLDER = """
import sys
from pathlib import Path
from abliterator.pipeline._workspace import Workspace
with Workspace(Path(sys.argv[1])).held():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder_and_a_killed_one_lets_go(project, tmp_path):
    build(project(), tmp_path / "out")
    before = files_of(tmp_path / "out")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    for recipe, force in ((project(), False), (project("k=1"), True)):
        with pytest.raises(OutputError, match="Another run is at work"):
            pipeline.build(recipe, tmp_path / "out", options=Options(device="cpu", force=force))
    assert files_of(tmp_path / "out") == before
    holder.kill()
    holder.communicate()
    _, log = build(project(), tmp_path / "out")
    assert log.skipped == ALL


@pytest.mark.parametrize(
    "left", [[], ["lock"], ["lock", ".abliterator.json.partial"], ["lock", "abliterator.json"]]
)
def test_killed_while_it_claims_its_folder_a_run_goes_on(project, tmp_path, left):
    recipe, work = project(), tmp_path / "out" / "work"
    work.mkdir(parents=True)
    for name in left:
        (work / name).touch()
    if "abliterator.json" in left:
        claim = {"tool": "abliterator", "recipe_digest": recipe.digest}
        (work / "abliterator.json").write_text(json.dumps(claim))
    pipeline.run_stages(recipe, tmp_path / "out", until="prompts", options=FAST)
    assert pipeline.recipe_of(tmp_path / "out").digest == recipe.digest
    assert (work / "stages" / "prompts.json").is_file()


# ---- refusals (more of them, through the command line, in test_bad_input)


def test_remote_code_of_the_hub_needs_a_commit(project, tmp_path):
    recipe = project("model=somebody/model", "trust_remote_code=true", "revision=main")
    with pytest.raises(RecipeError, match="revision"):
        build(recipe, tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_not_ours_is_left_alone(project, tmp_path, force):
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not made by abliterator"):
        pipeline.build(project(), tmp_path / "out", options=Options(force=force))
    assert files_of(tmp_path / "out") == {"checkpoint/thesis.tex": b"years of work"}


def test_an_error_after_the_directions_keeps_them(project, tmp_path, monkeypatch):
    from abliterator.engines import TransformersEngine
    from abliterator.errors import GenerationError

    def fail(*args, **kwargs):
        raise GenerationError("no memory")

    monkeypatch.setattr(TransformersEngine, "answers", fail)
    with pytest.raises(GenerationError):
        build(project(), tmp_path / "out")
    monkeypatch.undo()
    _, log = build(project(), tmp_path / "out")
    assert log.skipped == ["prompts", "capture", "directions", "bake", "config"]


# ---- without a recipe


def test_baking_a_given_subspace(tiny_folder, tmp_path):
    save_file({"subspace": torch.randn(32, 2)}, tmp_path / "q.safetensors")
    edits = pipeline.bake_subspace(
        str(tiny_folder("qwen3")), tmp_path / "q.safetensors", tmp_path / "out"
    )
    assert json.loads((tmp_path / "out" / "abliterator" / "edits.json").read_text()) == [
        edit.model_dump(mode="json") for edit in edits
    ]
    assert (tmp_path / "out" / "config.json").is_file()
    with pytest.raises(OutputError, match="not an empty folder"):
        pipeline.bake_subspace(
            str(tiny_folder("qwen3")), tmp_path / "q.safetensors", tmp_path / "out"
        )
