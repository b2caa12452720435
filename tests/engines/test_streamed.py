"""Weights read block by block: bit by bit what the model in memory computes, and how it fails."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from abliterator.anatomy import anatomy_of
from abliterator.bake import plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.engines import (
    AnswerPath,
    Sampling,
    Steering,
    StreamedEngine,
    StreamEdit,
    TransformersEngine,
    WriterEdit,
    open_engine,
    open_streamed,
)
from abliterator.engines._streamed._batch import THREAD
from abliterator.errors import CheckpointError, GenerationError, UnsupportedModel
from abliterator.model import load_model
from abliterator.recipe import Edit
from abliterator.subspace import orthonormal_basis
from tests.engines.seams import fail_on_call, limit_batches_together, spilled_bytes
from tests.helpers.tiny import CONFIGS, D_MODEL

PROMPTS = [[0, *range(4, 4 + n)] for n in (5, 12, 3, 12, 7)]
PATHS = [AnswerPath(tuple(prompt), 3) for prompt in PROMPTS]
SHARING = [AnswerPath((*range(4, 12), n, n + 1), 2) for n in (20, 30, 40)]
CONTINUATIONS = [(5, 6), (7,), (8, 9, 10)]


@pytest.fixture
def cpu_alone(monkeypatch):
    """No accelerator, whatever the machine has."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


def weights_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def in_memory(folder, dtype="float32"):
    return TransformersEngine(load_model(folder, device="cpu", dtype=dtype))


def streamed(folder, dtype="float32", **options):
    return open_streamed(folder, device="cpu", dtype=dtype, **options)


def edits_of(folder, **settings):
    checkpoint = Checkpoint.open(folder)
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit(**settings))
    basis = orthonormal_basis(torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(3)))
    writers = [WriterEdit(plan, basis), WriterEdit(plan, basis[:, :1])]
    return writers, StreamEdit(basis, 0.5), [Steering(layer, basis[:, 0]) for layer in (1, 2)]


def in_order(pairs):
    return [logits for *_, logits in sorted(pairs, key=lambda pair: pair[:-1])]


def measured(engine, folder):
    """Hidden states, logits and log-probabilities: plain, under each kind of edit, side by side."""
    writers, stream_edit, steerings = edits_of(folder)
    tables = [t for _, t in engine.hidden_states(PROMPTS, positions=(-1, -2), max_batch_tokens=24)]
    tables += [t for _, t in engine.hidden_states(PROMPTS, padding="left", max_batch_tokens=48)]
    tables += in_order(engine.logits(SHARING, max_batch_tokens=24, share_prefix=True))
    shared = [path.token_ids for path in SHARING]
    tables += [t for _, t in engine.hidden_states(shared, share_prefix=True, max_batch_tokens=24)]
    tables.append(engine.log_likelihoods(PROMPTS, CONTINUATIONS, max_batch_tokens=24))
    for edit in (writers[0], stream_edit, steerings[0]):
        with engine.edited(edit):
            tables += in_order(engine.logits(PATHS, max_batch_tokens=24))
    for edits in (writers, steerings):
        with engine.edited_side_by_side(edits, max_batch_tokens=24) as side_by_side:
            tables += in_order(side_by_side.logits(SHARING))
            tables.append(side_by_side.log_likelihoods(PROMPTS, CONTINUATIONS))
    return tables


def assert_equal(results, expected):
    assert len(results) == len(expected)
    assert [
        i for i, pair in enumerate(zip(results, expected, strict=True)) if not same(*pair)
    ] == []


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((f, "float32") for f in CONFIGS), *((f, "bfloat16") for f in ("llama_tied", "gemma"))],
)
def test_every_bit_is_the_in_memory_engines(family, dtype, tiny_folder):
    folder = tiny_folder(family)
    engine = streamed(folder, dtype)
    expected = in_memory(folder, dtype)
    assert_equal(measured(engine, folder), measured(expected, folder))
    for name in ("limits", "stop_ids", "hidden_shape"):
        assert getattr(engine, name) == getattr(expected, name)


def test_biases_that_stay_are_read_with_their_block(tiny_folder):
    folder = tiny_folder("llama_biased")
    edits, tables = [edits_of(folder, biases=biases)[0][0] for biases in (False, True)], []
    for engine in (streamed(folder), in_memory(folder)):
        for edit in edits:
            with engine.edited(edit):
                tables.append(torch.cat(in_order(engine.logits(PATHS, max_batch_tokens=24))))
    assert torch.equal(tables[0], tables[2])
    assert torch.equal(tables[1], tables[3])
    assert not torch.equal(tables[0], tables[1])


def test_hidden_states_on_disk_change_no_bit_and_leave_no_file(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    engine = streamed(folder, activation_bytes=2000, scratch=tmp_path)
    assert_equal(measured(engine, folder), measured(in_memory(folder), folder))
    assert spilled_bytes(engine) > 0
    assert list(tmp_path.iterdir()) == []
    roomy = streamed(folder, scratch=tmp_path)
    measured(roomy, folder)
    assert spilled_bytes(roomy) == 0


def test_many_batches_advance_in_groups(tiny_folder, monkeypatch):
    limit_batches_together(monkeypatch, 2)
    folder = tiny_folder("llama")
    assert_equal(measured(streamed(folder), folder), measured(in_memory(folder), folder))


def test_weights_are_read_once_for_all_batches(tiny_folder, monkeypatch):
    engine, opened = streamed(tiny_folder("llama")), []
    import safetensors

    original = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *a: opened.append(a) or original(*a))
    assert len(list(engine.hidden_states(PROMPTS, max_batch_tokens=1))) == len(PROMPTS)
    assert len(opened) == 3 + 2  # blocks, embedding, last norm


@pytest.mark.parametrize("stop_after", [0, 1])
def test_an_interrupted_pass_leaves_no_thread_no_file_no_hook(tiny_folder, tmp_path, stop_after):
    folder = tiny_folder("llama")
    engine = streamed(folder, activation_bytes=0, scratch=tmp_path)
    before = set(threading.enumerate())
    if stop_after:
        results = engine.hidden_states(PROMPTS, max_batch_tokens=1)
        next(results)
        results.close()
    else:
        with fail_on_call(engine, 7, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            list(engine.hidden_states(PROMPTS, max_batch_tokens=1))
    assert list(tmp_path.iterdir()) == []
    # other threads of this process come and go
    assert THREAD not in {thread.name for thread in set(threading.enumerate()) - before}
    assert_equal(measured(engine, folder), measured(in_memory(folder), folder))


def test_a_batch_that_does_not_fit_is_halved(tiny_folder):
    folder = tiny_folder("llama")
    engine = streamed(folder)
    prompts = [[0, 5, n] for n in range(4, 10)]
    with fail_on_call(engine, 3, torch.OutOfMemoryError):
        results = list(engine.hidden_states(prompts))
    assert [batch for batch, _ in results] == [[0, 1, 2], [3, 4, 5]]
    ((_, expected),) = in_memory(folder).hidden_states(prompts)
    torch.testing.assert_close(torch.cat([t for _, t in results]), expected, atol=1e-5, rtol=0)
    with (
        fail_on_call(engine, 1, torch.OutOfMemoryError),
        pytest.raises(GenerationError, match="One prompt alone does not fit"),
    ):
        list(engine.hidden_states(prompts[:1]))


def test_batches_that_wait_for_a_measurement_end_with_it(tiny_folder):
    """The first of them measures whether its cache is continued; here, it fails while it does."""
    engine = streamed(tiny_folder("llama"))
    parts_of_a_pass = 3 + 3  # blocks, embedding, norm, head
    with (
        fail_on_call(engine, len(PROMPTS) * parts_of_a_pass + 3, ArithmeticError),
        pytest.raises(ArithmeticError),
    ):
        engine.log_likelihoods(PROMPTS, [(5, 6)], max_batch_tokens=1)


def test_missing_and_other_weights_are_named_before_a_pass(tiny_folder, tmp_path):
    import safetensors.torch

    source = tiny_folder("llama")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = safetensors.torch.load_file(file)
    whole = dict(tensors)
    del tensors[name]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lack {name}"):
        streamed(tmp_path)
    tensors[name] = whole[name][:, :-1].contiguous()
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"does not make {name}"):
        streamed(tmp_path)
    safetensors.torch.save_file(whole, file, {"format": "pt"})
    engine = streamed(tmp_path)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})  # changed since it was opened
    with pytest.raises(CheckpointError, match=f"does not make {name}"):
        list(engine.hidden_states(PROMPTS))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "stored quantised"),
        ({"dtype": None}, "names no dtype"),
    ],
)
def test_what_cannot_be_read_in_parts_is_refused_by_name(tiny_folder, tmp_path, change, reason):
    for path in tiny_folder("llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(UnsupportedModel, match=reason):
        streamed(tmp_path, None)


def test_own_code_is_placed_on_disk_with_a_note(tiny_folder, cpu_alone):
    folder, notes = tiny_folder("qwen"), []
    options = {"dtype": "float32", "trust_remote_code": True, "device": "auto"}
    limit = weights_of(folder) * 6 // 10
    engine = open_engine(folder, **options, max_memory=limit, note=notes.append)
    assert isinstance(engine, TransformersEngine)
    assert "disk" in engine.loaded.placement.values()
    assert len(notes) == 1
    assert "its own Python code" in notes[0]


def test_answers_need_an_engine_or_the_placed_model(tiny_folder, cpu_alone):
    folder, notes = tiny_folder("llama"), []
    with pytest.raises(GenerationError, match="answers come from an engine: set `engine:`"):
        streamed(folder).answers(PROMPTS, max_new_tokens=3, batch_size=2)
    limit = weights_of(folder) * 6 // 10
    options = {"device": "auto", "dtype": "float32", "max_memory": limit}
    engine = open_engine(folder, **options, note=notes.append)
    assert isinstance(engine, StreamedEngine)
    assert len(notes) == 1
    assert "block by block" in notes[0]
    writers, *_ = edits_of(folder)
    expected = in_memory(folder)
    arguments = {"max_new_tokens": 4, "batch_size": 4}
    with engine.edited(writers[0]), expected.edited(writers[0]):
        answers = engine.answers(PROMPTS, **arguments)
        assert answers == expected.answers(PROMPTS, **arguments)
    assert answers != engine.answers(PROMPTS, **arguments)
    drawn = {**arguments, "sampling": Sampling(temperature=1.5, seed=1)}
    assert engine.answers(PROMPTS, **drawn) == expected.answers(PROMPTS, **drawn)
    with (
        engine.edited_side_by_side(writers, max_batch_tokens=64) as one,
        expected.edited_side_by_side(writers, max_batch_tokens=64) as other,
    ):
        assert one.answers(PROMPTS, **arguments) == other.answers(PROMPTS, **arguments)
    assert len(notes) == 2
    assert "in memory and on disk" in notes[1]
    assert_equal(measured(engine, folder), measured(expected, folder))


def test_a_model_that_fits_is_held_in_memory(tiny_folder, cpu_alone):
    folder = tiny_folder("llama")
    for options in ({"device": "auto"}, {"device": "cpu", "max_memory": 1}):
        assert isinstance(open_engine(folder, dtype="float32", **options), TransformersEngine)
