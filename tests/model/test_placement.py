"""Models whose weights lie on several devices, in host memory and on disk: equal bit by bit."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import accelerate.utils.offload
import pytest
import safetensors
import torch
from click.testing import CliRunner

from abliterator.anatomy import anatomy_of
from abliterator.bake import plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.engines import AnswerPath, Steering, StreamEdit, TransformersEngine, WriterEdit
from abliterator.errors import RecipeError
from abliterator.model import load_model, needs_disk, placement_of
from abliterator.recipe import Edit
from abliterator.subspace import orthonormal_basis
from tests.helpers import stand_in
from tests.helpers.stand_in import accelerator
from tests.helpers.tiny import D_MODEL, FAMILIES

PROMPTS = [[0, *range(4, 4 + n)] for n in (5, 12, 3, 12)]
LENGTH = 5

needs_stand_in = pytest.mark.skipif(
    not stand_in.available(), reason="torch has no backend in Python, or another accelerator"
)


class OpenedOnDevice:
    """safetensors' reader for a device that it does not know: read on the host and sent."""

    def __init__(self, file, framework, device="cpu"):
        self._file, self._device = safetensors.safe_open(file, framework=framework), device

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def get_tensor(self, name):
        return self._file.get_tensor(name).clone().to(self._device)  # aligned, as devices have it


@pytest.fixture
def cpu_alone(monkeypatch):
    """No accelerator, whatever the machine has."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


@contextmanager
def machine_with_two_devices():
    """A machine with two accelerators, which transformers and accelerate load weights onto."""
    with pytest.MonkeyPatch.context() as patch, accelerator(devices=2):
        patch.setattr(accelerate.utils.offload, "safe_open", OpenedOnDevice)
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # torch's modes hold for their own thread
        yield


@pytest.fixture
def two_devices():
    with machine_with_two_devices():
        yield


def weights_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load(folder, **options):
    return load_model(folder, dtype="float32", trust_remote_code="qwen" in folder.parts, **options)


def random_basis():
    return orthonormal_basis(torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(3)))


def measured(loaded):
    """Hidden states, answers, and logits along them: plain, and under an edit of every kind."""
    engine = TransformersEngine(loaded)
    exact = [states.cpu() for _, states in engine.hidden_states(PROMPTS)]
    answers = engine.answers(
        PROMPTS, max_new_tokens=LENGTH, batch_size=4, stop_ids=(), share_prefix=True
    )
    paths = [
        AnswerPath((*prompt, *answer.token_ids), LENGTH + 1)
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]
    checkpoint = Checkpoint.open(loaded.folder)
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit())
    basis, direction = random_basis(), random_basis()[:, 0]
    writer_edits = [WriterEdit(plan, basis), WriterEdit(plan, basis[:, :1])]
    steerings = [Steering(layer, direction) for layer in (1, 2)]
    for edit in (None, writer_edits[0], StreamEdit(basis, 0.5), steerings[0]):
        with nullcontext() if edit is None else engine.edited(edit):
            logits = engine.logits(paths, max_batch_tokens=64, share_prefix=True)
            exact += [table.cpu() for _, table in sorted(logits, key=lambda pair: pair[0])]
    close = []
    for edits in (writer_edits, steerings):
        with engine.edited_side_by_side(edits, max_batch_tokens=64) as side_by_side:
            close.append(side_by_side.log_likelihoods(PROMPTS, [(5, 6), (7,)]).cpu())
    return [answer.token_ids for answer in answers], exact, close


def assert_equal(one, other):
    assert one[0] == other[0]
    differences = [float((a - b).abs().max()) for a, b in zip(one[1], other[1], strict=True)]
    assert differences == [0.0] * len(differences)
    # the head reads a part of a row, or what came from another device as rows of their own: one of
    # the CPU's kernels or another
    torch.testing.assert_close(one[2], other[2], atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_on_disk_change_no_bit(family, tiny_folder, cpu_alone):
    folder = tiny_folder(family)
    spread = load(folder, device="auto", max_memory=weights_of(folder) * 6 // 10)
    assert set(spread.placement.values()) == {"cpu", "disk"}
    assert_equal(measured(spread), measured(load(folder, device="cpu")))


@needs_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"qwen"}))  # its code holds a CPU tensor
def test_two_devices_host_memory_and_disk_change_no_bit(family, tiny_folder, two_devices):
    folder = tiny_folder(family)
    expected = measured(load(folder, device="fake"))
    balanced = load(folder, device="balanced")
    assert set(balanced.placement.values()) == {"fake:0", "fake:1"}
    assert_equal(measured(balanced), expected)
    too_large = load(folder, device="auto", max_memory=weights_of(folder) * 4 // 10)
    assert {"cpu", "disk"} & {*too_large.placement.values()}
    assert_equal(measured(too_large), expected)


def test_a_build_with_weights_on_disk_is_the_same_build(tiny_folder, tmp_path, cpu_alone):
    """Bytes, answers and divergence; the command's option goes all the way."""
    texts = {name: [f"{name} {i}: where is it?" for i in range(6)] for name in ("t", "n")}
    for name, lines in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    folder = tiny_folder("llama")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {folder}\nlayers: [2]\nk: 1\nrollouts: {{max_new_tokens: 4}}\n"
        "prompts: {target: {path: t.txt}, neutral: {path: n.txt}}\n",
        encoding="utf-8",
    )
    results = []
    for name, memory in (("whole", []), ("spread", ["--max-memory", "60KB"])):
        arguments = ["build", str(recipe), "--out", str(tmp_path / name), "--device", "auto"]
        done = CliRunner().invoke(main, [*arguments, *memory])
        assert done.exit_code == 0, done.stderr
        assert ("are read block by block" in done.stderr) == bool(memory)
        work = tmp_path / name / "work"
        files = [tmp_path / name / "checkpoint" / "model.safetensors"]
        files += [work / "rollouts.jsonl", work / "divergence.json"]
        results.append([file.read_bytes() for file in files])
    assert results[0] == results[1]
    assert needs_disk(placement_of(folder, device="auto", dtype=None, max_memory=60_000))
    assert not needs_disk(placement_of(folder, device="auto", dtype=None))


@needs_stand_in
def test_one_device_is_taken_where_the_model_fits(tiny_folder):
    folder = tiny_folder("llama")
    with accelerator(devices=2):
        assert placement_of(folder, device="auto", dtype=None) == {"": "fake"}
        assert placement_of(folder, device="fake:1", dtype=None) == {"": "fake:1"}
        assert placement_of(folder, device="cpu", dtype=None) == {"": "cpu"}
        with pytest.raises(RecipeError, match="no device 'fake:2'"):
            placement_of(folder, device="fake:2", dtype=None)
    assert placement_of(folder, device="balanced", dtype=None) == {"": "cpu"}
    with accelerator(devices=1):
        assert placement_of(folder, device="balanced", dtype=None) == {"": "fake"}


def test_a_model_of_which_nothing_fits_is_read_from_disk(tiny_folder, cpu_alone):
    folder = tiny_folder("llama")
    assert "disk" in load(folder, device="auto", max_memory=1).placement.values()


@needs_stand_in
def test_a_device_that_is_too_small_is_filled_up_to_its_limit(tiny_folder):
    folder = tiny_folder("llama")
    size = weights_of(folder)
    with accelerator(devices=2, limit=size * 7 // 10):
        places = placement_of(folder, device="auto", dtype=None)
        assert {"fake:0", "fake:1"} <= {*places.values()}
        # decoded to a dtype of twice the bytes, not all of it fits
        wide = placement_of(tiny_folder("llama", dtype=torch.bfloat16), device="auto", dtype=None)
        assert wide == {"": "fake"}
