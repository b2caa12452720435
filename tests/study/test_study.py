"""Studies: the same figures as everything else that measures, laid side by side."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from abliterator import pipeline
from abliterator.cli import main
from abliterator.directions import Directions, Place
from abliterator.engines import StreamEdit, TransformersEngine
from abliterator.errors import PromptError, RecipeError
from abliterator.evaluation import EditEvaluator
from abliterator.model import hooked, load_model, render_chat
from abliterator.plots import can_draw
from abliterator.recipe import load_recipe
from abliterator.record import Study
from abliterator.source import resolve_folder
from abliterator.study import (
    study_alpha,
    study_confirmation,
    study_extraction,
    study_pairs,
    to_markdown,
)
from abliterator.subspace import orthonormal_basis
from tests.helpers.tiny import D_MODEL, N_LAYERS

RECIPES = Path(__file__).parents[2] / "recipes"

OPTIONS = pipeline.Options(device="cpu", dtype="float32")


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


BASIS = orthonormal_basis(random(2, D_MODEL))


def forward(context):
    """Logits, and the stream [T, H] that enters the first block and leaves every one."""
    stream, model = {}, context.engine.loaded.model
    seen = ["model.embed_tokens", *context.engine.blocks]
    hooks = {path: lambda h, path=path: stream.update({path: h[0].double()}) for path in seen}
    with torch.inference_mode(), hooked(model, hooks):
        ids = torch.tensor([context.target.token_ids[0]])
        logits = model(input_ids=ids).logits
    return logits, [stream[path] for path in seen]


def test_alpha_0_leaves_every_bit(context):
    base, _ = forward(context)
    with context.engine.edited(StreamEdit(BASIS, 0.0)):
        assert torch.equal(forward(context)[0], base)


def test_the_stream_has_none_of_it_and_the_writers_leave_the_embeddings_part(context):
    """Of a block's output the intervention takes all, an edit of the writers what they wrote."""
    with context.engine.edited(StreamEdit(BASIS, 1.0)):
        logits, (embedded, *blocks) = forward(context)
        for out in blocks:
            assert (out @ BASIS).norm() < 1e-5 * out.norm()
    with context.engine.edited(context.writer_edit(BASIS)):
        by_writers, (_, *blocks) = forward(context)
        for out in blocks:
            torch.testing.assert_close(out @ BASIS, embedded @ BASIS, atol=1e-5, rtol=1e-5)
    assert (embedded @ BASIS).norm() > 0.1
    assert not torch.allclose(logits, by_writers, atol=1e-2)


def test_half_of_alpha_takes_half_of_the_first_block(context):
    _, (_, base, *_) = forward(context)
    with context.engine.edited(StreamEdit(BASIS, 0.5)):
        _, (_, half, *_) = forward(context)
    wanted = base - 0.5 * base @ BASIS @ BASIS.T
    torch.testing.assert_close(half, wanted, atol=1e-5, rtol=1e-5)


def test_alpha_0_is_the_base_and_1_is_not(context, tmp_path):
    steps = []
    with EditEvaluator(context, tmp_path / "logits.bin", steps.append) as evaluator:
        study = study_alpha(evaluator, BASIS, (0.0, 1.0))
    base, none, whole = study.rows
    assert steps == ["base", "alpha 0", "alpha 1"]
    assert none.answers == base.answers
    assert none.divergence.kl.value == 0
    assert whole.divergence.kl.value > 0.01
    assert whole.divergence.kl.n == 8
    assert not list(tmp_path.iterdir())


def test_the_same_contrast_twice_makes_no_difference(context, tmp_path):
    directions = Directions(random(N_LAYERS, D_MODEL))
    with EditEvaluator(context, tmp_path / "logits.bin") as evaluator:
        study = study_pairs(evaluator, {"generic": directions, "paired": directions}, (1, 3))
    assert [row.name for row in study.rows[1:3]] == ["layer 1, generic", "layer 1, paired"]
    for generic, paired in (study.rows[1:3], study.rows[3:5]):
        assert generic.answers == paired.answers
        assert generic.divergence == paired.divergence
    for difference in study.differences:
        assert difference.cosine == pytest.approx(1)
        assert difference.delta.product.value == 0
    assert Study.model_validate_json(study.model_dump_json()) == study


def test_the_confirmation_stacks_what_there_is(context, tmp_path):
    directions = {-1: Directions(random(N_LAYERS, D_MODEL))}
    with EditEvaluator(context, tmp_path / "logits.bin") as evaluator:
        study = study_confirmation(evaluator, directions, [Place(2), Place(3), Place(1)])
    stacked = {row.name: row.layers for row in study.rows[1:]}
    assert stacked == {
        "layer 2": (2,),
        "layer 3": (3,),
        "layer 1": (1,),
        "top 3": (2, 3, 1),
        "all layers": (1, 2, 3),
    }
    *_, three, every = study.rows
    assert three.answers == every.answers  # one span, two orders
    kl = [row.divergence.kl.value for row in (three, every)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)


def test_padding_changes_next_to_nothing_in_float32_and_more_in_bfloat16():
    folder = resolve_folder("embedded:demo", revision=None).folder
    lines = {
        name: (RECIPES / "demo" / f"{name}.jsonl").read_text().splitlines()[:16]
        for name in ("target", "contrast")
    }
    found = {}
    for dtype in ("float32", "bfloat16"):
        loaded = load_model(folder, device="cpu", dtype=dtype)
        ids = [
            [render_chat(loaded.tokenizer, json.loads(line)["prompt"]) for line in some]
            for some in lines.values()
        ]
        found[dtype] = study_extraction(TransformersEngine(loaded), *ids)
    for wide in found["float32"].agreements:
        assert wide.apart.value < 1e-10
        assert wide.length == pytest.approx(1, abs=1e-5)
        assert wide.halves < 1
    narrow = found["bfloat16"].agreements[-1]
    assert 1e-9 < narrow.apart.value < 1e-3
    assert 0 <= narrow.apart.low < narrow.apart.value < narrow.apart.high
    assert narrow.apart.n == 16


def test_too_few_prompts_for_an_interval(context):
    with pytest.raises(PromptError, match="needs 8 prompts of each kind"):
        study_extraction(context.engine, [[0, 1]] * 7, context.target.token_ids)


@pytest.mark.parametrize("name", pipeline.STUDIES)
def test_the_command_prints_tables_keeps_figures_and_does_it_once(name, recipe, tmp_path):
    arguments = ["study", name, str(recipe), "--out", str(tmp_path / "o"), "--device", "cpu"]
    arguments += ["--draws", "3", "--set", "selection.controls=1"]
    arguments += ["--scales", "1"] if name == "estimators" else []
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    kept = tmp_path / "o" / "work" / "studies"
    assert done.stdout == (kept / f"{name}.md").read_text()
    assert done.stdout.startswith(f"# {name}: ")
    assert " prompts 16" in done.stdout
    again = CliRunner().invoke(main, [*arguments, "--json"])
    assert json.loads(again.stdout) == json.loads((kept / f"{name}.json").read_text())
    assert f"study-{name} (done before)" in again.stderr
    pictures = [f"{name}.png"] if name == "estimators" and can_draw() else []
    expected = [f"{name}.json", f"{name}.md", *pictures]
    assert sorted(path.name for path in kept.iterdir()) == expected


def test_a_row_is_what_a_build_measures(recipe, tmp_path):
    read, out = load_recipe(recipe), tmp_path / "o"
    record = pipeline.build(read, out, options=OPTIONS)
    study = pipeline.run_study("confirmation", read, out, options=OPTIONS)
    base, first, *_ = study.rows
    assert first.layers == (2,)
    target = record.behaviour["target"]
    assert (base.answers, first.answers, first.delta) == (target.base, target.edited, target.delta)
    assert first.divergence.kl.value == pytest.approx(record.divergence.kl.value, rel=1e-3)


def test_settings_are_part_of_what_was_measured(recipe, tmp_path):
    read, out = load_recipe(recipe), tmp_path / "o"
    asked = pipeline.StudySettings(limit=5, tokens=80, alphas=(1.0,))
    study = pipeline.run_study("alpha", read, out, asked, options=OPTIONS)
    assert study.about["target prompts"] == study.rows[1].answers.compliance.n == 5
    assert (study.about["tokens of an answer"], len(study.rows)) == (80, 2)
    other = pipeline.run_study("alpha", read, out, pipeline.StudySettings(limit=6), options=OPTIONS)
    assert (other.about["target prompts"], len(other.rows)) == (6, 8)


def test_what_cannot_be_studied(recipe, tmp_path, tiny_folder):
    read, out = load_recipe(recipe), tmp_path / "o"
    alone = load_recipe(recipe, overrides=["prompts.contrast=null"])
    with pytest.raises(RecipeError, match="the recipe has one"):
        pipeline.run_study("pairs", alone, out, options=OPTIONS)
    asked = pipeline.StudySettings(layers=(4,))
    with pytest.raises(RecipeError, match="layers 1 to 3"):
        pipeline.run_study("pairs", read, out, asked, options=OPTIONS)
    column = load_recipe(recipe, overrides=["edit.norm=column"])
    with pytest.raises(RecipeError, match="no run-time form"):
        pipeline.run_study("confirmation", column, out, options=OPTIONS)
    each = load_recipe(recipe, overrides=["directions.stack=per_layer"])
    with pytest.raises(RecipeError, match="one subspace out of the whole stream"):
        pipeline.run_study("alpha", each, out, options=OPTIONS)
    assert not out.exists()


def test_a_table_says_what_it_could_not_tell(context, tmp_path):
    with EditEvaluator(context, tmp_path / "logits.bin") as evaluator:
        study = study_alpha(evaluator, BASIS, ())
    lines = to_markdown(study).splitlines()
    assert lines[-1].startswith("| base |")
    assert len(lines) == 5
