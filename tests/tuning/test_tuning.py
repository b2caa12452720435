"""Strengths and directions by gradients: rows against one-by-one oracles, gradients, the front."""

from dataclasses import replace

import pytest
import torch

from abliterator.bake import preview_edit
from abliterator.errors import GenerationError
from abliterator.files import Journal
from abliterator.model import load_model
from abliterator.tuning import _descend, _packed, _rows
from abliterator.tuning._descend import descend
from abliterator.tuning._kept import KeptSteps
from abliterator.tuning._parameters import STRONGEST, EditParameters
from abliterator.tuning._rows import answer_logprobs, token_logprobs
from abliterator.tuning._types import Row
from tests.model.seams import share_prefixes_from
from tests.model.test_placement import machine_with_two_devices, needs_stand_in
from tests.tuning.contexts import (
    ROWS,
    basis_of,
    hooks_of,
    no_step,
    pairs_of,
    tiny_context,
    tiny_of,
)

# ---- rows


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
@pytest.mark.parametrize("shared", [(), (7, 8, 9, 10, 11, 12)])
def test_rows_in_one_batch_are_rows_one_by_one(tiny_loaded, family, shared):
    loaded = tiny_loaded(family)
    rows = [Row((*shared, *row.prompt), row.answer) for row in ROWS]
    for row, logprobs in zip(rows, answer_logprobs(loaded, rows), strict=True):
        whole = loaded.model(torch.tensor([[*row.prompt, *row.answer]])).logits[0].log_softmax(1)
        alone = whole[len(row.prompt) - 1 : -1]
        assert logprobs.shape == alone.shape == (len(row.answer), whole.shape[1])
        torch.testing.assert_close(logprobs, alone, atol=1e-5, rtol=1e-5)
        picked = token_logprobs(logprobs, row.answer)
        expected = alone[range(len(row.answer)), list(row.answer)]
        torch.testing.assert_close(picked, expected, atol=1e-5, rtol=1e-5)
    # the head sees whole sequences again
    assert loaded.model(torch.tensor([[1, 2, 3]])).logits.shape[1] == 3


@pytest.mark.parametrize(
    ("name", "together"),
    [("llama", True), ("gemma3_text", True), ("qwen3_moe", True), ("mamba2", False)],
)
def test_rows_run_as_one_sequence_where_the_model_keeps_them_apart(
    name, together, tiny_loaded, tmp_path, monkeypatch
):
    loaded = tiny_of(name, tiny_loaded, tmp_path)
    rows = [Row((7, 8, 9, 10, 11, 12, *row.prompt), row.answer) for row in ROWS]
    rows += [Row(row.prompt, (3, 4, 5, 6)) for row in rows]
    answer_logprobs(loaded, rows)  # what the model does with such a sequence is measured once
    seen = []
    embed = loaded.model.get_input_embeddings()
    handle = embed.register_forward_hook(lambda *call: seen.append(tuple(call[1][0].shape)))
    found = answer_logprobs(loaded, rows)
    handle.remove()
    # the shared tokens, the rest of each prompt, and each answer but its last token; 4 begins two
    n = 6 + sum(len(row.prompt) + len(row.answer) - 1 + 3 for row in ROWS) - 1
    assert (seen == [(1, n)]) == together
    monkeypatch.setattr(_rows, "takes_packed", lambda loaded: False)
    for one, other in zip(found, answer_logprobs(loaded, rows), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_many_rows_are_several_sequences_of_one_pass(tiny_loaded, monkeypatch):
    loaded = tiny_loaded("llama")
    whole = answer_logprobs(loaded, ROWS)
    monkeypatch.setattr(_packed, "LONGEST", 9)
    sequences, order = _packed.packed(ROWS)
    assert sorted(order) == [0, 1, 2]
    assert [len(s.tokens) for s in sequences] == [6, 8]
    for one, other in zip(whole, answer_logprobs(loaded, ROWS), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# ---- gradients


@pytest.mark.parametrize("family", ["llama", "llama_biased"])
def test_gradients_through_the_preview_are_finite_differences(tiny_folder, family):
    loaded = load_model(tiny_folder(family), device="cpu", dtype="float32")
    loaded.model.double()
    context = tiny_context(loaded)
    basis = basis_of(2).requires_grad_()
    modules = list(dict.fromkeys(edit.writer.module for edit in context.plan.edits))
    strengths = torch.full((len(modules),), 0.7, dtype=torch.float64, requires_grad=True)

    def loss(basis, strengths):
        named = dict(zip(modules, strengths, strict=True))
        with preview_edit(loaded, context.plan, basis, named):
            return loaded.model(torch.tensor([[4, 9, 17]])).logits[0, -1].log_softmax(0)[5]

    given = (basis, strengths)
    loss(*given).backward()
    step = 1e-3  # norms compute in float32, whatever the model's dtype
    for inputs, gradient in ((basis, basis.grad), (strengths, strengths.grad)):
        for place in (0, inputs.numel() // 2, inputs.numel() - 1):
            move = torch.zeros(inputs.numel(), dtype=torch.float64)
            move[place] = step
            moved = [
                loss(*(x + sign * move.reshape(x.shape) if x is inputs else x for x in given))
                for sign in (1, -1)
            ]
            found = (moved[0] - moved[1]).item() / (2 * step)
            expected = gradient.reshape(-1)[place].item()
            assert found == pytest.approx(expected, rel=0.02, abs=1e-4)
    assert gradient.abs().min() > 0  # every writer's strength matters


def test_gradients_flow_through_what_rows_share(tiny_loaded, monkeypatch):
    """In one sequence, through the cache of a common prefix, and in whole rows."""
    context = tiny_context(tiny_loaded("llama"))
    rows = [Row((7, 8, 9, 10, 11, 12, *row.prompt), row.answer) for row in ROWS]

    def gradient():
        basis = basis_of(2).requires_grad_()
        with preview_edit(context.loaded, context.plan, basis):
            found = answer_logprobs(context.loaded, rows)
        sum(logprobs[:, 3].sum() for logprobs in found).backward()
        return basis.grad

    together = gradient()
    monkeypatch.setattr(_rows, "takes_packed", lambda loaded: False)
    shared = gradient()
    share_prefixes_from(monkeypatch, 100)
    torch.testing.assert_close(shared, gradient(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shared, together, atol=1e-5, rtol=1e-4)
    assert shared.abs().max() > 1e-3


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_gradients_flow_after_a_pass_that_records_none(tiny_loaded, without_gradients):
    """As where the model is first measured for wider rows, in the middle of a descent."""
    context = tiny_context(tiny_loaded("llama"))
    basis, ids = basis_of(2).requires_grad_(), torch.tensor([[4, 9, 17]])
    gradients = []
    for passes_before in (0, 1):
        basis.grad = None
        with preview_edit(context.loaded, context.plan, basis):
            for _ in range(passes_before):
                with without_gradients():
                    context.loaded.model(ids)
            context.loaded.model(ids).logits[0, -1].log_softmax(0)[5].backward()
        gradients.append(basis.grad)
    assert gradients[0].abs().max() > 1e-3
    assert gradients[1].equal(gradients[0])


def test_what_is_not_tuned_stays(tiny_loaded):
    context = tiny_context(tiny_loaded("llama"), steps=3, batch=2, kl_weights=(1.0,))
    pairs, basis = pairs_of(), basis_of(2)
    before = {name: p.clone() for name, p in context.loaded.model.named_parameters()}
    hooks = hooks_of(context.loaded.model)  # transformers may have put its own there
    both, only_strengths, only_directions = (
        descend(replace(context, **kind), pairs, basis, on_step=no_step)[0]
        for kind in ({}, {"directions": False}, {"strengths": False})
    )
    torch.testing.assert_close(only_strengths.basis, basis, atol=1e-6, rtol=0)
    assert set(only_directions.strengths.values()) == {1.0}
    assert (both.basis - basis).abs().max() > 1e-3
    assert all(0 < s < STRONGEST for s in both.strengths.values())
    assert len(set(both.strengths.values())) == len(both.strengths) > 1
    for found in (both, only_strengths, only_directions):
        unit = found.basis.T @ found.basis
        torch.testing.assert_close(unit, torch.eye(2, dtype=torch.float64))
    after = dict(context.loaded.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert hooks_of(context.loaded.model) == hooks


def test_a_subspace_of_each_block_is_tuned_block_by_block(tiny_loaded):
    context = tiny_context(tiny_loaded("llama"), steps=2, kl_weights=(1.0,))
    shared = basis_of(2)
    found = descend(context, pairs_of(), shared.expand(3, -1, -1), on_step=no_step)[0]
    for own in found.basis:
        torch.testing.assert_close(own.T @ own, torch.eye(2, dtype=torch.float64))
        assert (own - shared).abs().max() > 1e-3
    assert (found.basis[0] - found.basis[1]).abs().max() > 1e-3


def test_the_same_seed_finds_the_same(tiny_loaded):
    context = tiny_context(tiny_loaded("llama"), steps=2, batch=2, kl_weights=(1.0,))
    pairs = pairs_of()
    one, two = (descend(context, pairs, basis_of(1), on_step=no_step)[0] for _ in range(2))
    assert torch.equal(one.basis, two.basis)
    assert one.strengths == two.strengths


@needs_stand_in
def test_a_model_on_two_devices_is_tuned_as_on_one(tiny_folder):
    found = []
    with machine_with_two_devices():
        for device in ("fake", "balanced"):
            loaded = load_model(tiny_folder("llama"), dtype="float32", device=device)
            context = tiny_context(loaded, steps=2, batch=2, kl_weights=(1.0,))
            found += descend(context, pairs_of((6, 7)), basis_of(2), on_step=no_step)
    assert {*loaded.placement.values()} == {"fake:0", "fake:1"}
    assert torch.equal(found[0].basis, found[1].basis)
    assert found[0].strengths == found[1].strengths


def test_each_phase_learns_what_the_one_before_it_left(tiny_loaded):
    context = tiny_context(tiny_loaded("llama"), steps=1, batch=2, kl_weights=(1.0, 2.0, 3.0))
    seen = []

    def ask_again(pairs, edit):
        seen.append((pairs, edit))
        return pairs_of((6, 6 + len(seen)))

    first = pairs_of()
    found = descend(context, first, basis_of(1), on_step=no_step, ask_again=ask_again)
    assert [edit for _, edit in seen] == found[:2]
    assert [pairs for pairs, _ in seen] == [first, pairs_of((6, 7))]


def test_a_rejected_response_becomes_less_likely_than_the_answer(tiny_loaded):
    context = tiny_context(tiny_loaded("llama"), steps=24, batch=3, kl_weights=(1e-3,))
    rejected = (11, 40)

    def margin(pairs):
        edit = descend(context, pairs, basis_of(1), on_step=no_step)[0]
        rows = [Row(row.prompt, answer) for row in ROWS for answer in (row.answer[:2], rejected)]
        with preview_edit(context.loaded, context.plan, edit.basis, edit.strengths):
            found = answer_logprobs(context.loaded, rows)
        said = [token_logprobs(x, r.answer).sum() for x, r in zip(found, rows, strict=True)]
        return float(sum(said[::2]) - sum(said[1::2]))

    assert margin(pairs_of(rejected, rejected)) > margin(pairs_of())


def test_the_base_runs_once_along_each_neutral_answer(tiny_loaded, monkeypatch):
    """Unless its logits take more memory than may be kept; then in every step."""
    context = tiny_context(tiny_loaded("llama"), steps=4, batch=2, kl_weights=(1.0, 2.0))
    edited, alone = _descend.answer_logits, []

    def counted(loaded, rows):
        alone.extend(rows)
        return edited(loaded, rows)

    monkeypatch.setattr(_descend, "answer_logits", counted)
    kept = descend(context, pairs_of(), basis_of(1), on_step=no_step)
    assert sorted(alone) == sorted(ROWS)
    alone.clear()
    monkeypatch.setattr(_descend, "KEPT", 0)
    again = descend(context, pairs_of(), basis_of(1), on_step=no_step)
    assert len(alone) == 2 * 4 * 2
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(one.basis, other.basis, atol=1e-5, rtol=0)
        assert one.strengths == pytest.approx(dict(other.strengths), abs=1e-3)


def test_strengths_start_half_way(tiny_loaded):
    parameters = EditParameters(tiny_context(tiny_loaded("llama")), basis_of(1))
    assert set(parameters.edit().strengths.values()) == {round(STRONGEST / 2, 4)}


def test_logits_that_are_nan_stop_the_descent(tiny_folder):
    loaded = load_model(tiny_folder("llama"), device="cpu", dtype="float32")
    context = tiny_context(loaded, steps=1)
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(GenerationError, match=r"logits .* are NaN"):
        descend(context, pairs_of(), basis_of(1), on_step=no_step)


def test_a_phase_that_was_finished_is_not_descended_again(tiny_loaded, tmp_path):
    context = tiny_context(tiny_loaded("llama"), steps=2, batch=2, kl_weights=(1.0, 2.0, 3.0))

    def ask_again(pairs, edit):
        return replace(pairs, target=pairs.target[::-1])

    def descended(path, interrupt_at=None):
        steps = []

        def on_step(name):
            steps.append(name)
            if len(steps) == interrupt_at:
                raise KeyboardInterrupt

        kept = KeptSteps(Journal(path))
        options = {"on_step": on_step, "ask_again": ask_again, "kept": kept}
        return descend(context, pairs_of((11, 40)), basis_of(2), **options), steps

    expected, all_steps = descended(tmp_path / "whole.jsonl")
    assert len(all_steps) == 6
    path = tmp_path / "interrupted.jsonl"
    for _ in range(2):  # in the middle of the second phase, then of the third
        with pytest.raises(KeyboardInterrupt):
            descended(path, interrupt_at=3)
    edits, steps = descended(path)
    assert steps == all_steps[4:]
    for edit, other in zip(edits, expected, strict=True):
        assert torch.equal(edit.basis, other.basis)
        assert edit.strengths == other.strengths
