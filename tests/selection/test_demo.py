"""The demo: one direction, learned, that sweep and k: auto must find."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from abliterator import pipeline
from abliterator.bake import bake, plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.directions import load_subspace
from abliterator.engines import TransformersEngine, WriterEdit
from abliterator.model import load_model, render_chat
from abliterator.pipeline import Options
from abliterator.recipe import Edit, load_recipe
from abliterator.subspace import random_basis
from abliterator.verification import verify

ROOT = Path(__file__).parents[2]
FAST = Options(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    settings = ["layers=sweep", "k=auto", "selection.skip_last=0", "benchmarks.tasks=[]"]
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", overrides=settings)

    def run(name, until):
        out = tmp_path_factory.mktemp("demo") / name
        pipeline.run_stages(recipe, out, until=until, options=FAST)
        return out

    return run("first", "card"), run("second", "selection")


@pytest.mark.slow
def test_the_demo_needs_one_direction(demo):
    found = json.loads((demo[0] / "work" / "sweep.json").read_text())
    assert found["k"] == 1
    assert found["structure"]["verdict"] == "single direction"
    (one, *_) = found["stacks"]
    assert one["answers"]["product"]["value"] >= 0.9
    base = found["base"]["answers"]["refusal"]["value"]
    for tried in found["stacks"]:  # as many directions that know nothing remove nothing
        for control in ("random", "shuffled"):
            assert base - tried[control]["refusal"]["value"] <= 0.1
    assert len(found["structure"]["cosines"]) == 7
    record = pipeline.read_record(demo[0])
    assert record.selection.model_dump(mode="json") == found
    assert record.edit.layers == tuple(found["layers"][:1])
    assert record.behaviour["target"].edited.refusal.value <= 0.1
    card = (demo[0] / "checkpoint" / "README.md").read_text()
    assert "chosen by a sweep over 7 layers" in card
    assert "(abliterator/cosines.png)" in card
    assert "(abliterator/sweep.png)" in card
    base = ROOT / "abliterator" / "data" / "demo" / "model"
    proof = verify(base, demo[0] / "checkpoint")
    assert proof.faults == proof.foreign == ()
    for name, digest in record.pictures.items():
        drawn = demo[0] / "work" / "plots" / Path(name).name
        assert proof.sha256[name] == digest == hashlib.sha256(drawn.read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_same_recipe_chooses_the_same(demo):
    names = ["work/sweep.json", "work/plots/sweep.png", "work/plots/cosines.png"]
    first, second = ({n: (out / n).read_bytes() for n in names} for out in demo)
    assert first == second


@pytest.mark.slow
def test_what_was_judged_by_hooks_is_what_was_baked(demo, tmp_path):
    """Greedy answers under the preview and of baked files, on all held-out prompts.

    Of a float32 copy: storing in bfloat16 rounds, and may tip one greedy answer in some dozens.
    """
    prompts = json.loads((demo[0] / "work" / "prompts.json").read_text())["selection"]["target"]
    from abliterator.anatomy import anatomy_of

    stored = ROOT / "abliterator" / "data" / "demo" / "model"
    shutil.copytree(stored, tmp_path / "wide")
    wide = {n: t.float() for n, t in load_file(stored / "model.safetensors").items()}
    save_file(wide, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path / "wide")
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit())
    basis = load_subspace(demo[0] / "work" / "directions.safetensors").basis

    def answered(folder):
        engine = TransformersEngine(load_model(folder, device="cpu", dtype="float32"))
        ids = [render_chat(engine.tokenizer, p) for p in prompts["prompts"]]

        def texts():
            return [a.text for a in engine.answers(ids, max_new_tokens=48, batch_size=32)]

        return engine, texts

    engine, texts = answered(checkpoint.folder)
    plain = texts()
    with engine.edited(WriterEdit(plan, basis)):
        previewed = texts()
    # as the sweep does it: half of the rows under another edit
    ids = [render_chat(engine.tokenizer, p) for p in prompts["prompts"]]
    edits = [WriterEdit(plan, q) for q in (random_basis(len(basis), 2, seed=0), basis)]
    with engine.edited_side_by_side(edits, max_batch_tokens=4096) as edited:
        other, same = edited.answers(ids, max_new_tokens=48, batch_size=64)
    bake(checkpoint, plan, basis, tmp_path / "baked")
    baked = answered(tmp_path / "baked")[1]()
    assert previewed == baked
    assert [a.text for a in same] == baked
    assert [a.text for a in other] != baked
    assert previewed != plain
