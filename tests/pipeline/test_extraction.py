"""Positions and stacks of directions, from a recipe to a baked checkpoint of a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from abliterator import pipeline
from abliterator.capture import capture, load_moments
from abliterator.directions import stack, within_layer
from abliterator.engines import TransformersEngine, answer_of
from abliterator.errors import DirectionError, PromptError, RecipeError
from abliterator.model import load_model, render_chat, template_tail
from abliterator.pipeline import Options
from abliterator.pipeline.stages.prompts import PromptSets
from abliterator.recipe import load_recipe
from abliterator.subspace import cosine_matrix
from abliterator.thinking import Splitter
from abliterator.verification import verify

FAST = Options(device="cpu", dtype="float32")
TAIL = 7  # "<|im_end|>\n<|im_start|>assistant\n" in the tiny tokenizer


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """A recipe with pairs on a tiny random model."""
    words = [f"{a}{b}" for a in "abcd" for b in "efgh"]
    for name, text in (("t", "Where is the {} now?"), ("c", "What is the {} now?")):
        (tmp_path / f"{name}.txt").write_text("\n".join(text.format(word) for word in words))
    (tmp_path / "n.txt").write_text("\n".join(f"Name {word}." for word in words))
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {tiny_folder()}\nlayers: [2, 1]\nk: 1\nrollouts: {{max_new_tokens: 80}}\n"
        "prompts: {target: {path: t.txt}, contrast: {path: c.txt}, neutral: {path: n.txt}}\n"
    )
    return lambda *overrides: load_recipe(path, overrides=overrides)


def made(recipe, out, until="bake"):
    pipeline.run_stages(recipe, out, until=until, options=FAST)
    return out / "work"


def used(work):
    return PromptSets.model_validate_json((work / "prompts.json").read_text())


def test_the_tail_is_what_the_template_puts_after_every_prompt(tiny_loaded):
    tokenizer = tiny_loaded().tokenizer
    tail = template_tail(tokenizer)
    assert tail == render_chat(tokenizer, "Anything at all")[-len(tail) :]
    assert tokenizer.decode(tail) == "<|im_end|>\n<|im_start|>assistant\n"
    with_system = template_tail(tokenizer, system="Be brief.")
    assert with_system == tail


def test_every_position_of_a_sweep_is_captured_as_if_alone(recipe, tmp_path):
    work = made(recipe("directions.position=sweep", "k=auto"), tmp_path / "out", "capture")
    found = load_moments(work / "moments.safetensors")
    loaded = load_model(Path(recipe().model), device="cpu", dtype="float32")
    n = len(template_tail(loaded.tokenizer))
    parts = ["", "/half0", "/half1", "/half2"]  # a half for each draw of shuffled labels
    kinds = [f"{kind}{part}" for kind in ("target", "contrast") for part in parts]
    assert set(found) == {f"{kind}@{p}" for kind in kinds for p in range(-n, 0)}
    prompts = used(work).extraction["target"].prompts
    ids = [render_chat(loaded.tokenizer, prompt) for prompt in prompts]
    for position in (-1, -n):
        alone = capture(TransformersEngine(loaded), ids, position=position)
        torch.testing.assert_close(found[f"target@{position}"].mean, alone.mean)
        assert found[f"target@{position}"].n == len(prompts)
        halves = [found[f"target/half{i}@{position}"] for i in range(3)]
        assert {half.n for half in halves} == {len(prompts) // 2}
        assert not torch.allclose(halves[0].mean, halves[1].mean)


def test_a_position_that_is_named_is_the_one_that_is_removed(recipe, tmp_path):
    work = made(recipe("directions.position=-3"), tmp_path / "third", "directions")
    swept = made(recipe("directions.position=sweep", "k=auto"), tmp_path / "all", "capture")
    every = load_moments(swept / "moments.safetensors")
    # no prompt is held out for a choice here, so the sets differ: only what is said counts
    assert every["target@-3"].n < load_moments(work / "moments.safetensors")["target"].n
    last = made(recipe(), tmp_path / "last", "directions")
    files = [load_file(w / "directions.safetensors") for w in (work, last)]
    assert files[0]["subspace"].shape == files[1]["subspace"].shape == (32, 1)
    assert not torch.allclose(files[0]["subspace"], files[1]["subspace"], atol=1e-3)


@pytest.mark.parametrize("position", [-8, -40])
def test_a_position_that_the_template_does_not_have(recipe, tmp_path, position):
    with pytest.raises(
        DirectionError, match=f"puts {TAIL} tokens .* -1 to -{TAIL}; it is {position}"
    ):
        made(recipe(f"directions.position={position}"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_within_a_layer_the_mean_difference_and_components_of_the_pairs(recipe, tmp_path):
    """Held-out prompts leave pairs; Q is what the differences of the pairs that are left give."""
    out = tmp_path / "out"
    work = made(recipe("directions.stack=within_layer", "k=3"), out)
    sets = used(work)
    assert sets.pairs
    for t, c in sets.pairs:
        target, contrast = (
            sets.extraction[n].prompts[i] for n, i in (("target", t), ("contrast", c))
        )
        assert contrast == target.replace("Where", "What")
    stored = load_file(work / "directions.safetensors")
    loaded = load_model(Path(recipe().model), device="cpu", dtype="float32")

    def at_layer_2(kind, index):
        ids = [render_chat(loaded.tokenizer, sets.extraction[kind].prompts[index])]
        return capture(TransformersEngine(loaded), ids).mean[1]

    pairs = torch.stack(
        [at_layer_2("target", t) - at_layer_2("contrast", c) for t, c in sets.pairs]
    )
    wanted = within_layer(stored["directions"][1], pairs)[:3]
    overlap = torch.linalg.svdvals(stored["subspace"].T @ torch.linalg.qr(wanted.T).Q)
    torch.testing.assert_close(overlap, torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)
    edits = json.loads((out / "checkpoint" / "abliterator" / "edits.json").read_text())
    assert {edit["k"] for edit in edits} == {3}


def test_each_block_loses_its_own_layer(recipe, tmp_path):
    out = tmp_path / "out"
    work = made(recipe("directions.stack=per_layer", "layers=[1, 2, 3]"), out, "config")
    stored = load_file(work / "directions.safetensors")
    assert stored["subspace"].shape == (3, 32, 1)
    for block in range(3):
        pair = torch.stack([stored["subspace"][block, :, 0], stored["directions"][block]])
        assert float(cosine_matrix(pair)[0, 1]) == pytest.approx(1)
    found = verify(
        Path(recipe().model), out / "checkpoint", subspace=work / "directions.safetensors"
    )
    assert found.ok


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["directions.stack=per_layer", "k=2"], "leaves nothing to a sweep"),
        (["directions.stack=per_layer", "layers=sweep"], "leaves nothing to a sweep"),
        (["directions.stack=within_layer", "prompts.contrast=null"], "needs pairs"),
        (["directions.stack=within_layer", "directions.projection=neutral"], "as they are"),
        (["selection.rungs=[8, 8]"], "must grow"),
        (["directions.position=last"], "directions.position"),
    ],
)
def test_stacks_and_positions_that_cannot_be(recipe, overrides, says):
    with pytest.raises(RecipeError, match=says):
        recipe(*overrides)


def test_pairs_of_two_lengths(recipe, tmp_path):
    path = tmp_path / "c.txt"
    path.write_text(path.read_text().rsplit("\n", 1)[0])
    with pytest.raises(PromptError, match="there are 16 and 15"):
        made(recipe("directions.stack=within_layer", "k=2"), tmp_path / "out", "prompts")


def test_a_stack_of_layers_may_come_from_several_positions(recipe, tmp_path):
    """`stack` is what a single position gives."""
    work = made(recipe("k=2"), tmp_path / "out", "directions")
    stored = load_file(work / "directions.safetensors")
    from abliterator.directions import Directions

    again = stack(Directions(stored["directions"]), (2, 1)).basis
    torch.testing.assert_close(stored["subspace"], again)


# Positions with a name


def test_an_instruction_is_captured_as_the_prompt_up_to_it(recipe, tmp_path):
    """A residual depends on no later token: the whole prompt has the same, further in."""
    work = made(recipe("directions.position=instruction"), tmp_path / "out", "directions")
    found = load_moments(work / "moments.safetensors")
    loaded = load_model(Path(recipe().model), device="cpu", dtype="float32")
    prompts = used(work).extraction["target"].prompts
    whole = [render_chat(loaded.tokenizer, prompt) for prompt in prompts]
    assert all(loaded.tokenizer.decode(ids[:-TAIL]).endswith(" now?") for ids in whole)
    further_in = capture(TransformersEngine(loaded), whole, position=-TAIL - 1)
    torch.testing.assert_close(found["target"].mean, further_in.mean, rtol=1e-4, atol=1e-5)
    at_the_end = capture(TransformersEngine(loaded), whole)
    assert not torch.allclose(found["target"].mean, at_the_end.mean, atol=1e-2)
    with pytest.raises(DirectionError, match="own text is `instruction`"):
        made(recipe(f"directions.position={-TAIL - 1}"), tmp_path / "beyond")


def test_several_positions_are_swept_and_told(recipe, tmp_path):
    swept = recipe("directions.position=[instruction, -1, -2]", "k=auto")
    work = made(swept, tmp_path / "out", "capture")
    found = load_moments(work / "moments.safetensors")
    kinds = {name.partition("@")[0] for name in found}
    assert {"target", "contrast", "target/half0"} <= kinds
    assert set(found) == {f"{kind}@{p}" for kind in kinds for p in (-1, -2, "instruction")}
    for position in ("instruction", -2):
        alone = made(recipe(f"directions.position={position}", "k=auto"), tmp_path / "x", "capture")
        alone = load_moments(alone / "moments.safetensors")
        assert torch.equal(found[f"target@{position}"].mean, alone["target"].mean)
        shutil.rmtree(tmp_path / "x")
    plan = pipeline.plan_recipe(swept, tmp_path / "plan")
    assert any("positions -1" not in n and "instruction, -1, -2" in n for n in plan.notes)
    assert any("last token of the user's own text" in note for note in plan.notes)
    assert plan.selection["judged"] == 2 * 3  # layers and positions


def test_pairs_are_captured_at_a_named_position(recipe, tmp_path):
    overrides = ("directions.stack=within_layer", "k=2", "directions.position=instruction")
    out = tmp_path / "out"
    work = made(recipe(*overrides), out)
    differences = load_file(work / "differences.safetensors")
    assert set(differences) == {"instruction"}
    assert len(differences["instruction"]) == len(used(work).pairs)
    verification = verify(Path(recipe().model), out / "checkpoint")
    assert verification.ok


THOUGHT, LONG = "Which river is it? The old one.", "Which river is it? " * 9


class Notes(pipeline.Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def thinking(monkeypatch, *, long):
    """Lets every model think before it answers, for too long about the prompts with a word."""

    def answers(self, prompts, *, max_new_tokens, answered=None, on_batch=None, **_):
        splitter, rows = Splitter(self.tokenizer), []
        for prompt in prompts:
            text = LONG if long in self.tokenizer.decode(prompt) else THOUGHT
            reply = f"<think>\n{text}\n</think>\n\nIn the old town."
            row = self.tokenizer(reply, add_special_tokens=False)["input_ids"]
            rows.append(answer_of(splitter, prompt, [*row, 2][:max_new_tokens], [2]))
        return rows

    monkeypatch.setattr(TransformersEngine, "answers", answers)


def test_after_thinking_is_where_the_answer_begins(recipe, tmp_path, monkeypatch):
    thinking(monkeypatch, long="ae")
    made_recipe = recipe("directions.position=after_thinking", "rollouts.thinking_tokens=60")
    log = Notes()
    pipeline.run_stages(made_recipe, tmp_path / "out", until="capture", options=FAST, progress=log)
    work = tmp_path / "out" / "work"
    loaded = load_model(Path(recipe().model), device="cpu", dtype="float32")
    prompts = [p for p in used(work).extraction["target"].prompts if "ae" not in p]
    behind = loaded.tokenizer(f"<think>\n{THOUGHT}\n</think>\n\n", add_special_tokens=False)
    extended = [render_chat(loaded.tokenizer, p) + behind["input_ids"] for p in prompts]
    found = load_moments(work / "moments.safetensors")["target"]
    assert found.n == len(prompts) == len(used(work).extraction["target"].prompts) - 1
    expected = capture(TransformersEngine(loaded), extended)
    torch.testing.assert_close(found.mean, expected.mean)
    n = f"on {len(prompts)} of the {len(prompts) + 1} target"
    assert any(f"within 60 tokens {n}" in note for note in log.notes)


def test_a_base_that_comes_to_no_answer(recipe, tmp_path, monkeypatch):
    thinking(monkeypatch, long="now")
    with pytest.raises(DirectionError, match=r"within 80 tokens on 0 of the .*thinking_tokens"):
        made(recipe("directions.position=after_thinking"), tmp_path / "out", "capture")


def test_a_base_that_does_not_think(recipe, tmp_path):
    with pytest.raises(DirectionError, match=r"thinks and comes .* on 0 of .* another position"):
        made(recipe("directions.position=after_thinking"), tmp_path / "out", "capture")


def test_thinking_that_the_template_closes(recipe, tmp_path):
    """A template that writes an empty thought: the answer begins behind the prompt."""
    folder = tmp_path / "model"
    shutil.copytree(recipe().model, folder)
    template = folder / "chat_template.jinja"
    text = template.read_text()
    assert "assistant\n" in text
    template.write_text(text.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"))
    overrides = (f"model={folder}", "rollouts.max_new_tokens=4")
    after, last = (
        load_moments(
            made(recipe(*overrides, f"directions.position={p}"), tmp_path / str(p), "capture")
            / "moments.safetensors"
        )["target"]
        for p in ("after_thinking", -1)
    )
    assert torch.equal(after.mean, last.mean)


@pytest.mark.parametrize(
    ("position", "says"),
    [
        ("middle", "instruction"),
        ("[-1]", "at least 2"),
        ("[-1, -1]", "given twice"),
        ("[-1, sweep]", "directions.position"),
        ("0", "less than or equal to -1"),
    ],
)
def test_positions_that_are_none(recipe, position, says):
    with pytest.raises(RecipeError, match=says):
        recipe(f"directions.position={position}")
