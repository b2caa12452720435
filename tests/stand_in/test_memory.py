"""Too little memory: a named error that says what to choose, and nothing that was made is lost.

Each command runs in one folder, again and again, with a little more memory each time: what it
leaves in the end has the CPU's figures, though its batches were halved.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel

from abliterator.cli import main
from abliterator.engines import TransformersEngine
from abliterator.errors import GenerationError
from abliterator.model import load_model
from tests.helpers import stand_in
from tests.helpers.stand_in import accelerator

pytestmark = pytest.mark.skipif(not stand_in.available(), reason="torch has no backend in Python")

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "abliterator" / "data" / "demo" / "model"
WEIGHTS = 5_700_000  # bytes of the demo model in float32, a little less
SMALL = [f"prompts.{name}.limit=4" for name in ("target", "contrast", "neutral", "evaluation")]
SMALL += ["rollouts.max_new_tokens=4", "divergence.tokens=4", "benchmarks.tasks=[]"]
SWEEP = ["layers=sweep", "k=auto", "selection.skip_last=0"]
TUNED = ["directions.estimator=tuned", "edit.strength=auto", "tuning.steps=1", "tuning.batch=2"]
TUNED += ["tuning.kl_weights=[20]", "tuning.scales=[1]", "tuning.tokens=4"]
TUNED += ["prompts.target.limit=16", "prompts.contrast.limit=16", "prompts.neutral.limit=16"]

# Of each command: what it sets, what it leaves, and the memory in which it needs no halving.
COMMANDS = {
    "build": ([], "checkpoint/abliterator/edits.json", 9_000_000),
    "sweep": (SWEEP, "work/sweep.json", 11_000_000),
    "directions": (TUNED, "work/tuning.json", 20_000_000),
}
STEPS = 10


def invoke(command, out, device):
    settings, *_ = COMMANDS[command]
    arguments = [command, str(ROOT / "recipes" / "demo.yaml"), "--out", str(out)]
    arguments += ["--device", device, "--dtype", "float32"]
    for setting in [*SMALL, *settings]:
        arguments += ["--set", setting]
    with sdpa_kernel(SDPBackend.MATH):
        return CliRunner().invoke(main, arguments)


def stages(out):
    """The marker of each stage that is done, and when it was written."""
    return {path.stem: path.stat().st_mtime_ns for path in out.glob("work/stages/*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_next_run_with_more_memory_goes_on(command, tmp_path):
    assert invoke(command, tmp_path / "cpu", "cpu").exit_code == 0
    _, artefact, enough = COMMANDS[command]
    step = (enough - WEIGHTS) // (STEPS - 1)
    codes, kept, out = [], {}, tmp_path / "limited"
    for limit in range(WEIGHTS, WEIGHTS + STEPS * step, step):
        with accelerator(limit=limit):
            result = invoke(command, out, "fake")
        codes.append(result.exit_code)
        done = stages(out)
        assert kept.items() <= done.items()
        kept = done
        if result.exit_code:
            assert isinstance(result.exception, SystemExit), result.exception
            assert "GenerationError" in result.output
            assert "--dtype bfloat16" in result.output
    assert (codes[0], codes[-1]) == (1, 0)
    texts = [(tmp_path / name / artefact).read_text() for name in ("cpu", "limited")]
    cpu, limited = (json.loads(text, parse_float=nine_digits) for text in texts)
    assert limited == cpu


def nine_digits(number):
    """Eigenvalues depend on how the host's memory is aligned, in their last digit."""
    return float(f"{float(number):.9g}")


def test_weights_that_do_not_fit():
    with accelerator(limit=WEIGHTS // 2):
        says = r"On device 'fake', the model in \S+ does not fit in memory: .*--dtype bfloat16"
        with pytest.raises(GenerationError, match=says):
            load_model(DEMO, device="fake", dtype="float32")


def test_weights_that_leave_no_memory_for_a_token():
    """Loading tries the model; it has no say on what will be asked of it."""
    with accelerator() as machine:
        loaded = load_model(DEMO, device="fake", dtype="float32")
        weights = sum(p.nbytes for p in {*loaded.model.parameters(), *loaded.model.buffers()})
        del loaded
    assert machine.used[0] == 0
    with accelerator(limit=weights + 100):
        loaded = load_model(DEMO, device="fake", dtype="float32")
        with pytest.raises(GenerationError, match="One prompt alone does not fit"):
            TransformersEngine(loaded).answers(
                [[4, 5, 6]], max_new_tokens=2, batch_size=1, stop_ids=()
            )
