"""Every command on the stand-in accelerator, without float64: the CPU's figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from abliterator import load_model
from abliterator.cli import main
from tests.helpers import stand_in
from tests.helpers.quantised import save_quantised
from tests.helpers.stand_in import accelerator
from tests.helpers.tiny import VOCABULARY, train_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not stand_in.available(), reason="torch has no backend in Python"),
    # transformers warns of the very argument with which it is to be told to decode on loading
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
]

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "recipes" / "demo.yaml"
NEUTRAL = ROOT / "recipes" / "demo" / "neutral.jsonl"
SETS = ("target", "contrast", "neutral", "evaluation")
SMALL = [f"prompts.{name}.limit=4" for name in SETS]
SMALL += ["rollouts.max_new_tokens=4", "divergence.tokens=4", "benchmarks.tasks=[]"]
TUNED = ["directions.estimator=tuned", "edit.strength=auto", "tuning.steps=1", "tuning.batch=2"]
TUNED += ["tuning.kl_weights=[20]", "tuning.scales=[1]", "tuning.tokens=4"]
TUNED += [f"prompts.{name}.limit=16" for name in SETS[:3]]
TIMES = {"timing", "provenance"}  # parts of a record that no two runs share


def on(device, *arguments, settings=(), dtype="float32"):
    """A command on the demo's recipe, made small."""
    with sdpa_kernel(SDPBackend.MATH):
        result = CliRunner().invoke(
            main,
            [
                *map(str, arguments),
                *("--device", device, "--dtype", dtype),
                *(part for setting in settings for part in ("--set", setting)),
            ],
            catch_exceptions=False,
        )
    assert result.exit_code == 0, result.output
    return result.stdout


def on_both(tmp_path, *command, settings=(), **options):
    """The folders that a command on the recipe leaves, of the CPU and of the stand-in."""
    outs = tmp_path / "cpu", tmp_path / "fake"
    arguments = [*command, DEMO, "--out"]
    settings = [*SMALL, *settings]
    on("cpu", *arguments, outs[0], settings=settings, **options)
    with accelerator():
        on("fake", *arguments, outs[1], settings=settings, **options)
    return outs


def nine_digits(number):
    """Eigenvalues depend on how the host's memory is aligned, in their last digit."""
    return float(f"{float(number):.9g}")


def read(path):
    return json.loads(path.read_text(), parse_float=nine_digits)


def record(out):
    values = read(out / "checkpoint" / "abliterator" / "record.json")
    assert values["provenance"]["device"] == out.name
    return {key: value for key, value in values.items() if key not in TIMES}


def weights(out):
    return {
        f"{path.name} {name}": tensor
        for path in sorted((out / "checkpoint").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_build(cpu, fake):
    assert record(fake) == record(cpu)
    expected = weights(cpu)
    assert weights(fake).keys() == expected.keys()
    assert all(
        torch.equal(tensor.float(), expected[name].float())
        for name, tensor in weights(fake).items()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [[], ["directions.stack=per_layer", "layers=[1, 2, 3, 4]"], TUNED],
    ids=["mean_diff", "per_layer", "tuned"],
)
def test_a_build(settings, dtype, tmp_path):
    assert_same_build(*on_both(tmp_path, "build", settings=settings, dtype=dtype))


@pytest.mark.parametrize("name", ["fp8_block", "compressed_row", "mxfp4", "awq", "modelopt"])
def test_a_build_of_low_precision_weights(name, tmp_path):
    model = save_quantised(name, tmp_path / "model", vocabulary=VOCABULARY)
    train_tokenizer().save_pretrained(model)
    settings = [f"model={model}", "layers=[1]"]
    assert_same_build(*on_both(tmp_path, "build", settings=settings, dtype="bfloat16"))


def test_a_sweep(tmp_path):
    settings = ["layers=sweep", "k=auto", "selection.skip_last=0"]
    cpu, fake = on_both(tmp_path, "sweep", settings=settings)
    assert read(fake / "work" / "sweep.json") == read(cpu / "work" / "sweep.json")


@pytest.mark.parametrize("name", ["extraction", "pairs", "alpha", "confirmation", "controls"])
def test_a_study(name, tmp_path):
    settings = ["selection.controls=1"]
    if name == "extraction":  # an interval takes more prompts
        settings += [f"prompts.{part}.limit=8" for part in SETS]
    cpu, fake = on_both(tmp_path, "study", name, settings=settings)
    results = [read(next((out / "work" / "studies").glob("*.json"))) for out in (cpu, fake)]
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build on the CPU, whose two sides are compared and talked to."""
    out = tmp_path_factory.mktemp("built") / "cpu"
    on("cpu", "build", DEMO, "--out", out, settings=SMALL)
    return out


def test_a_comparison(built):
    model = ROOT / "abliterator" / "data" / "demo" / "model"
    arguments = ["compare", model, built, "--neutral", NEUTRAL, "--limit", "6", "--json"]
    arguments += ["--max-new-tokens", "8"]
    expected = on("cpu", *arguments)
    with accelerator():
        assert on("fake", *arguments) == expected


@pytest.mark.parametrize("sides", [[], ["--base"], ["--compare"]])
def test_a_chat(sides, built):
    def answers(device):
        arguments = ["chat", str(built), "--max-new-tokens", "6", "--device", device, *sides]
        with sdpa_kernel(SDPBackend.MATH):
            result = CliRunner().invoke(
                main, [*arguments, "--dtype", "float32"], input="Name a planet.\n"
            )
        assert result.exit_code == 0, result.output
        return result.stdout

    expected = answers("cpu")
    with accelerator():
        assert answers("fake") == expected


def test_the_python_api(tiny_folder):
    """A model is loaded where it is asked for, in the dtype that is asked for."""
    ids = torch.tensor([[4, 9, 17]])
    for dtype in ("float32", "bfloat16"):
        with sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
            cpu = load_model(tiny_folder("gemma"), device="cpu", dtype=dtype)
            expected = cpu.model(ids).logits
            with accelerator(devices=2):
                loaded = load_model(tiny_folder("gemma"), device="fake:1", dtype=dtype)
                logits = loaded.model(ids.to("fake:1")).logits
                assert logits.device == torch.device("fake:1")
                assert torch.equal(logits.cpu(), expected)
