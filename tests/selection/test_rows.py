"""Many edits in one batch, and what prompts begin with run once: each as if it ran alone, whole."""

import dataclasses

import pytest
import torch

from abliterator.engines import AnswerPath, Steering, WriterEdit
from abliterator.model import ByRow, Prefix, run_prefix, shared_tokens
from abliterator.selection._scores import mean_log_odds
from abliterator.subspace import random_basis
from tests.helpers import architectures
from tests.helpers.architectures import D_MODEL
from tests.model.seams import share_prefixes_from
from tests.selection.contexts import context_of, removed

SYSTEM = [7, 8, 9, 10, 11, 12]
PROMPTS = [[*SYSTEM, *rest] for rest in ([5], [6, 7], [9, 4], [3, 3, 3, 8], [20])]
FORCED = [(3, 4, 5), (6,), (), (4, 4), (9, 9, 9)]
PATHS = [
    AnswerPath((*prompt, *answer), len(answer) + 1)
    for prompt, answer in zip(PROMPTS, FORCED, strict=True)
]
OPENINGS = [(11, 12, 13), (20,)]
BASES = [random_basis(D_MODEL, k, seed=k) for k in (1, 3, 2)]

# plain keys and values; windows; experts; state spaces; both
SHARE, WHOLE = ("llama", "gemma", "qwen3_moe"), ("gemma3_text", "mamba2", "qwen3_next")


def architecture(name, tiny_loaded, tmp_path):
    """A tiny model of that architecture, to be measured."""
    folder = architectures.save(name, tmp_path / name)
    model = type(architectures.build(name)).from_pretrained(folder).eval()
    loaded = dataclasses.replace(tiny_loaded(), model=model, folder=folder)
    return context_of(loaded, PROMPTS, max_new_tokens=3, max_batch_tokens=16)


def scores(context, bases):
    """Everything that is asked of edits: log-odds, distributions, answers; removed and added."""
    with removed(context, bases) as edited:
        odds = [mean_log_odds(edited, context.target, OPENINGS)]
        along = {(i, p): found.log_softmax(dim=1) for i, p, found in edited.logits(PATHS)}
        answers = edited.answers(PROMPTS, max_new_tokens=3, batch_size=context.batch_size)
    added = [Steering(1, basis[:, 0]) for basis in bases]
    limit = context.max_batch_tokens
    with context.engine.edited_side_by_side(added, max_batch_tokens=limit) as steered:
        odds.append(mean_log_odds(steered, context.target, OPENINGS))
    texts = [[answer.token_ids for answer in one] for one in answers]
    return torch.tensor(odds), [along[key] for key in sorted(along)], texts


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], atol=1e-4, rtol=0)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert one[2] == other[2]


@pytest.mark.parametrize("name", SHARE + WHOLE)
def test_what_prompts_share_changes_no_score(name, tiny_loaded, tmp_path, monkeypatch):
    context = architecture(name, tiny_loaded, tmp_path)
    scores(context, BASES)  # what a model does with padding is measured once
    seen = []
    embed = context.engine.loaded.model.get_input_embeddings()
    handle = embed.register_forward_hook(lambda *call: seen.append(tuple(call[1][0].shape)))
    shared = scores(context, BASES)
    handle.remove()
    assert (max(width for _, width in seen) <= len(SYSTEM) + 1) == (name in SHARE)
    share_prefixes_from(monkeypatch, 1000)
    assert_same(shared, scores(context, BASES))
    alone = [scores(context, [basis]) for basis in BASES]
    assert_same(
        shared,
        (
            torch.cat([odds for odds, *_ in alone], dim=1),
            [found for _, along, _ in alone for found in along],
            [texts for *_, (texts,) in alone],
        ),
    )


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3_moe"])
def test_edits_with_strengths_of_their_own_run_as_each_alone(name, tiny_loaded, tmp_path):
    context = architecture(name, tiny_loaded, tmp_path)
    modules = list(dict.fromkeys(edit.writer.module for edit in context.plan.edits))
    blocks, _ = context.engine.hidden_shape
    by_block = torch.stack([random_basis(D_MODEL, 1, seed=i) for i in range(blocks)])
    bases = [BASES[0], BASES[1], by_block]
    shares = (dict.fromkeys(modules, 0.4), {modules[0]: 0.0, modules[1]: 1.2}, {})
    edits = [WriterEdit(context.plan, b, s) for b, s in zip(bases, shares, strict=True)]
    with context.engine.edited_side_by_side(edits, max_batch_tokens=10_000) as edited:
        together = {(i, p): logits for i, p, logits in edited.logits(PATHS)}
    alone = {}
    for i, edit in enumerate(edits):
        with context.engine.edited(edit):
            found = context.engine.logits(PATHS, max_batch_tokens=10_000)
            alone |= {(i, p): logits for p, logits in found}
    assert together.keys() == alone.keys()
    for key, logits in alone.items():
        torch.testing.assert_close(together[key], logits, atol=1e-4, rtol=1e-4)
    assert (alone[0, 0] - alone[1, 0]).abs().max() > 1e-3


def test_a_prefix_under_another_edit_shows(tiny_loaded, tmp_path, monkeypatch):
    """The negative of the test above: the shared tokens run under the edit of the wrong row."""
    context = architecture("llama", tiny_loaded, tmp_path)
    context = dataclasses.replace(context, max_batch_tokens=10_000)  # all edits in one group
    right = scores(context, BASES)
    enter = Prefix.enter

    def turned(prefix, batch):
        of = [(i + 1) % len(BASES) for i in prefix.by_row.of]
        wrong = dataclasses.replace(prefix, by_row=ByRow(of, lambda rows: None))
        cache = enter(wrong, batch)
        prefix.by_row.choose([prefix.by_row.of[i] for i in batch])
        return cache

    monkeypatch.setattr(Prefix, "enter", turned)
    wrong = scores(context, BASES)
    assert (right[0] - wrong[0]).abs().min() > 1e-3


def test_the_shared_tokens_run_once_for_each_edit(tiny_loaded):
    loaded, chosen = tiny_loaded(), []
    prefix = run_prefix(loaded, PROMPTS * 2, ByRow([0] * 5 + [1] * 5, chosen.append))
    assert prefix.length == shared_tokens(PROMPTS) == 6
    assert chosen == [[0, 1]]
    first, second = (prefix.enter([2, 7, 3]) for _ in range(2))
    assert chosen[1:] == [[0, 1, 0]] * 2
    assert first.layers[0].keys.shape[0] == 3
    first.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), 0)
    assert second.get_seq_length() == prefix.cache.get_seq_length() == 6


def test_edits_whose_prefixes_do_not_fit_run_in_groups(tiny_loaded, tmp_path):
    """16 tokens a pass hold two prefixes of 6: three edits are two groups, and nothing changes."""
    context = architecture("llama", tiny_loaded, tmp_path)
    with removed(context, BASES) as edited:
        assert edited._groups(PROMPTS) == [range(2), range(2, 3)]
    wide = dataclasses.replace(context, max_batch_tokens=10_000)
    assert_same(scores(context, BASES), scores(wide, BASES))


def test_nothing_to_share(tiny_loaded):
    loaded = tiny_loaded()
    assert shared_tokens([[1, 2, 3], [1, 2, 3]]) == 2  # the last has an answer to predict
    assert shared_tokens([[1, 2, 3], [4, 2, 3]]) == shared_tokens([]) == 0
    prefix = run_prefix(loaded, [[1, 2, 3, 4], [1, 2, 3, 5]])
    assert (prefix.length, prefix.enter([0, 1])) == (0, None)
    assert run_prefix(loaded, [[4] * 9] * 2).enter([1]).layers[0].keys.shape[0] == 1
