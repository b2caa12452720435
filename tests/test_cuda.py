"""What runs a model, on a GPU against the CPU. Skipped where there is none."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from abliterator import pipeline
from abliterator.bake import preview_edit
from abliterator.capture import capture
from abliterator.cli import main
from abliterator.engines import TransformersEngine
from abliterator.errors import GenerationError
from abliterator.model import load_model, run_batches
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe
from abliterator.record import Comparison
from abliterator.subspace import random_basis
from tests.benchmarks.toy import opened
from tests.evaluation.test_divergence import first_token_logprobs
from tests.helpers import tiny
from tests.helpers.baked import planned
from tests.helpers.quantised import D_MODEL, save_quantised
from tests.selection.test_rows import (
    BASES,
    PROMPTS,
    SHARE,
    WHOLE,
    architecture,
    assert_same,
    scores,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA reaches"),
]

DEMO = Path(__file__).parents[1] / "recipes" / "demo.yaml"
FAMILIES = ("llama", "gemma", "phi3", "qwen3", "smollm3", "mistral")


def on_gpu(loaded):
    return replace(loaded, model=deepcopy(loaded.model).to("cuda"), device="cuda")


def test_without_a_number_as_many_prompts_are_answered_together_as_fit(tiny_loaded):
    sizes = []
    engine = TransformersEngine(on_gpu(tiny_loaded("llama")))
    engine.answers([PROMPTS[0]] * 600, max_new_tokens=2, on_batch=sizes.append)
    assert sizes == [512, 88]


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_means_answers_and_distributions(family, tiny_loaded):
    cpu = tiny_loaded(family)
    gpu = on_gpu(cpu)
    found = []
    for loaded in (cpu, gpu):
        engine = TransformersEngine(loaded)
        answers = engine.answers(PROMPTS, max_new_tokens=6, batch_size=3, stop_ids=())
        captured = capture(engine, PROMPTS, max_batch_tokens=32)
        logprobs = first_token_logprobs(loaded, PROMPTS, max_batch_tokens=32)
        found.append((captured.mean, logprobs, [answer.token_ids for answer in answers]))
    (mean, logprobs, ids), (mean_gpu, logprobs_gpu, ids_gpu) = found
    torch.testing.assert_close(mean_gpu, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logprobs_gpu.cpu(), logprobs, rtol=1e-4, atol=1e-4)
    assert ids_gpu == ids


@pytest.mark.parametrize("name", SHARE + WHOLE)
def test_scores_of_edits_by_rows(name, tiny_loaded, tmp_path):
    cpu = architecture(name, tiny_loaded, tmp_path)
    gpu = replace(cpu, engine=TransformersEngine(on_gpu(cpu.engine.loaded)))
    odds, along, texts = scores(gpu, BASES)
    assert_same((odds, [each.cpu() for each in along], texts), scores(cpu, BASES))


@pytest.mark.parametrize("name", ["fp8_block", "fp8_ue8m0", "fp8_block experts", "mxfp4"])
def test_quantised_models_are_those_that_a_cpu_runs(name, tmp_path):
    """FP8 for real: beside a GPU, transformers leaves it packed unless told otherwise."""
    save_quantised(name, tmp_path)
    tiny.train_tokenizer().save_pretrained(tmp_path)
    _, plan = planned(tmp_path)
    tokens = torch.tensor([[5, 9, 17, 30], [4, 8, 60, 61]])
    logits = []
    for device in ("cpu", "cuda"):
        loaded = load_model(tmp_path, device=device, dtype="float32")
        benchmarked = opened(tmp_path, device=device, dtype="float32")
        with torch.inference_mode():
            plain = loaded.model(tokens.to(device)).logits.cpu()
            assert torch.equal(benchmarked(tokens.to(device)).logits.cpu(), plain)
            with preview_edit(loaded, plan, random_basis(D_MODEL, 2, seed=1)):
                logits.append((plain, loaded.model(tokens.to(device)).logits.cpu()))
    for cpu, gpu in zip(*logits, strict=True):  # what lies beside the experts stays bfloat16
        torch.testing.assert_close(gpu, cpu, rtol=2e-2, atol=2e-2 * float(cpu.abs().max()))


def test_what_does_not_fit_is_halved():
    """Real memory: half a gigabyte a row, where a little over two gigabytes may be taken."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((5 << 29) / total)

    def run(batch):
        return torch.empty(len(batch), 1 << 29, dtype=torch.uint8, device="cuda").shape[0]

    try:
        assert [len(batch) for batch, _ in run_batches([list(range(12))], run)] == [3] * 4
        with pytest.raises(GenerationError, match="does not fit in the device's memory"):
            list(run_batches([[0]], lambda _: torch.empty(3 << 30, device="cuda")))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def chosen(recipe, out, **options):
    """A whole build on the device: record, sweep if any, and the baked tensors."""
    record = pipeline.build(recipe, out, options=Options(**options))
    sweep = out / "work" / "sweep.json"
    found = json.loads(sweep.read_text()) if sweep.exists() else None
    return record, found, load_file(out / "checkpoint" / "model.safetensors")


@pytest.mark.slow
def test_a_build_chooses_and_measures_as_on_the_cpu_and_twice_the_same(tmp_path):
    recipe = load_recipe(DEMO, overrides=["layers=sweep", "k=auto", "benchmarks.tasks=[]"])
    cpu, sweep_cpu, _ = chosen(recipe, tmp_path / "cpu", device="cpu", dtype="float32")
    gpu, sweep, baked = chosen(recipe, tmp_path / "gpu", device="cuda", dtype="float32")
    assert gpu.provenance.hardware == torch.cuda.get_device_name()
    assert (gpu.edit.layers, sweep["k"]) == (cpu.edit.layers, sweep_cpu["k"])
    assert gpu.edit.max_leak < 1e-3
    for side in ("base", "edited"):
        for name in ("target", "neutral"):
            one, other = (getattr(r.behaviour[name], side).refusal.value for r in (gpu, cpu))
            assert abs(one - other) <= 0.05
    assert gpu.divergence.kl.value == pytest.approx(cpu.divergence.kl.value, rel=0.1)
    again, sweep_again, baked_again = chosen(
        recipe, tmp_path / "again", device="cuda", dtype="float32"
    )
    assert sweep_again == sweep
    assert again.behaviour == gpu.behaviour
    assert all(torch.equal(tensor, baked[name]) for name, tensor in baked_again.items())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_direction_is_tuned_and_baked(dtype, tmp_path):
    overrides = ["edit.strength=auto", "directions.estimator=tuned", "tuning.steps=6"]
    overrides += ["tuning.kl_weights=[20]", "benchmarks.tasks=[]"]
    recipe = load_recipe(DEMO, overrides=overrides)
    record, _, _ = chosen(recipe, tmp_path / "out", device="cuda", dtype=dtype)
    assert record.behaviour["target"].base.refusal.value >= 0.95
    assert record.behaviour["target"].edited.refusal.value <= 0.05


@pytest.mark.slow
def test_two_models_are_compared(tmp_path):
    pipeline.run_stages(load_recipe(DEMO), tmp_path, until="bake", options=Options())
    base, edited = DEMO.parents[1] / "abliterator" / "data" / "demo" / "model", tmp_path
    arguments = ["compare", str(base), str(edited / "checkpoint"), "--dtype", "float32", "--json"]
    arguments += ["--neutral", str(DEMO.parent / "demo" / "neutral.jsonl")]
    arguments += ["--max-new-tokens", "32"]  # the demo reads 256 tokens, the prompt's among them

    def compared(device):
        asked = [*arguments, "--device", device]
        result = CliRunner().invoke(main, asked, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return Comparison.model_validate_json(result.stdout)

    cpu, gpu = compared("cpu"), compared("cuda")
    assert gpu.weights == cpu.weights
    assert gpu.divergence.kl.value == pytest.approx(cpu.divergence.kl.value, rel=0.05)
