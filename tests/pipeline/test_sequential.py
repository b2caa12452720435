"""`directions.stack: sequential`: directions removed one after the other, built and proven."""

import hashlib
import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from abliterator.cli import main
from abliterator.directions import left_behind, load_directions
from abliterator.errors import DirectionError, RecipeError
from abliterator.pipeline import bake_subspace, read_record
from abliterator.study import random_like
from tests.pipeline.builds import build, write_project

LAYERS = (3, 1, 2)
SEQUENTIAL = ("directions.stack=sequential", "layers=[3, 1, 2]", "k=3")
STRENGTHS = "edit.strength={attention: 1.0, mlp: 0.75}"


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("project")
    return folder, write_project(folder, tiny_folder)


@pytest.fixture(scope="module")
def built(project):
    """The folder of a build with a checkpoint and an adapter, and its record."""
    folder, recipe = project
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        overrides = (*SEQUENTIAL, STRENGTHS, "edit.output=both", "edit.biases=false")
        record, _ = build(recipe(*overrides), folder / "out")
    return folder / "out", record


def directions_of(out):
    """The removed directions [3, H] of the build, in the order of their removal."""
    stored = load_file(out / "work/directions.safetensors")["directions"]
    return stored[[layer - 1 for layer in LAYERS]].double()


def test_stored_is_the_base_with_the_directions_projected_out_in_turn(project, built):
    folder, (out, _) = project[0], built
    before, after = {}, {}
    for tensors, source in ((before, folder / "base"), (after, out / "checkpoint")):
        for path in source.glob("*.safetensors"):
            tensors |= load_file(path)
    edits = json.loads((out / "checkpoint/abliterator/edits.json").read_text())
    assert {edit["subspace"] for edit in edits} == {"writer"}
    matrices = [edit for edit in edits if edit["component"] != "embedding"]
    assert {edit["strength"] for edit in matrices} == {1.0, 0.75}
    units = normalize(directions_of(out), dim=1)
    for edit in matrices:
        weight = before[edit["name"]].double()
        removed = weight
        for unit in units:
            removed = removed - unit[:, None] * (unit @ removed)
        exact = weight + edit["strength"] * (removed - weight)
        rounded = (exact - exact.bfloat16().double()).norm()
        stored = after[edit["name"]].double()
        assert (stored - exact).norm() <= 1.5 * rounded
        assert (units[-1] @ stored).norm() < (1 - edit["strength"] + 0.02) * weight.norm()


def test_the_hooks_of_the_published_directions_are_the_bake(project, built):
    folder, (out, _) = project[0], built
    tokens = torch.arange(4, 13)[None]

    def loaded(source):
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    with torch.inference_mode():
        base = loaded(folder / "base")
        plain = base(tokens).logits
        with load_directions(out / "checkpoint").ablated(base):
            hooked = base(tokens).logits
        baked = loaded(out / "checkpoint")(tokens).logits
    assert (plain - baked).norm() > 20 * (hooked - baked).norm()


def test_record_and_card_say_how_much_is_left(built):
    out, record = built
    left = left_behind(directions_of(out))
    assert record.directions.left_behind == pytest.approx(left.tolist(), abs=1e-6)
    assert record.directions.left_behind[-1] == 0 < min(record.directions.left_behind[:-1])
    assert read_record(out).directions == record.directions
    assert record.edit.max_leak is None
    for card in (out / "checkpoint/README.md", out / "adapter/README.md"):
        text = card.read_text()
        shares = ", ".join(f"{share:.3f}" for share in left.tolist())
        assert f"in the order of removal | {shares} |" in text
        assert "W' = (1 - s) W + s M W" in text
        assert "Q Qᵀ" not in text
        assert "tuned from" not in text


def test_verify_computes_the_tensors_again_and_names_one_that_differs(built, project, tmp_path):
    out, _ = built
    done = CliRunner().invoke(main, ["verify", str(out)])
    assert done.exit_code == 0, done.output
    assert "no shared subspace is promised to be absent" in done.output
    assert "adapter: verified" in done.output
    edits = json.loads((out / "checkpoint/abliterator/edits.json").read_text())
    name = next(edit["name"] for edit in edits if edit["strength"] == 0.75)
    path = next(p for p in (out / "checkpoint").glob("*.safetensors") if name in load_file(p))
    shutil.copytree(out / "checkpoint", tmp_path / "changed")
    listed = tmp_path / "changed/abliterator/edits.json"
    tensors = load_file(path)
    tensors[name] = tensors[name] * 1.02
    save_file(tensors, tmp_path / "changed" / path.name, metadata={"format": "pt"})
    stored = tensors[name].view(torch.int16).numpy().tobytes()
    for edit in edits:
        if edit["name"] == name:
            edit["sha256_after"] = hashlib.sha256(stored).hexdigest()
    listed.write_text(json.dumps(edits))
    base = str(project[0] / "base")
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "changed"), "--base", base])
    assert done.exit_code == 1
    assert f"{name}: what is stored is" in done.output


def test_the_plan_says_what_is_promised(project):
    arguments = [f"--set={override}" for override in SEQUENTIAL]
    done = CliRunner().invoke(main, ["plan", str(project[0] / "r.yaml"), *arguments])
    assert done.exit_code == 0, done.output
    assert "layer 3 then layer 1 then layer 2: only the last is gone" in " ".join(
        done.output.split()
    )


def test_the_pairs_are_no_subspace_to_bake_alone(built, project, tmp_path):
    subspace = built[0] / "work/directions.safetensors"
    with pytest.raises(DirectionError, match="Only the recipe that made it bakes it"):
        bake_subspace(str(project[0] / "base"), subspace, tmp_path / "out")


def test_controls_are_of_the_same_kind(built):
    pairs = load_file(built[0] / "work/directions.safetensors")["subspace"].double()
    drawn = random_like(pairs, 0)
    assert drawn.shape == pairs.shape
    assert torch.equal(drawn, drawn[:1, :1].expand_as(drawn))
    assert not torch.equal(drawn, random_like(pairs, 1))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["k=1"], "a k of 2 or more"),
        (["k=auto"], "name `layers`, one position"),
        (["layers=sweep"], "name `layers`, one position"),
        (["directions.position=[-1, instruction]"], "name `layers`, one position"),
        (["k=4"], "only 3 layers are given"),
        (["directions.estimator=tuned", "edit.strength=auto"], "leave out `estimator: tuned`"),
        (["edit.strength=auto"], "`stack: sequential` is not tuned"),
        (["edit.norm=column"], "`stack: sequential` edits W'.* leave `norm: none`"),
        (["tuning.max_change=0.1"], "belong to `directions.stack: per_writer`"),
    ],
)
def test_recipes_that_cannot_be(overrides, says, project):
    with pytest.raises(RecipeError, match=says):
        project[1](*SEQUENTIAL, *overrides)
