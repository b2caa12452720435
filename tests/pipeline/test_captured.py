"""Sums of a capture outlive their process after every batch."""

import pytest
import torch

from abliterator.pipeline._captured import CapturedSet

SHAPE = 3, 8
BATCHES = [[0, 2], [1], [3, 4]]


def captured_set(path, *, within_layer=False):
    vectors = torch.zeros(5, 2, *SHAPE) if within_layer else None
    parts = {"target": range(5), "target/half0": (1, 4)}
    return CapturedSet(path, parts, (-1, -2), SHAPE, vectors=vectors)


def add(captured, batches):
    for batch in batches:
        generator = torch.Generator().manual_seed(batch[0])
        captured.add(batch, torch.randn(len(batch), 2, *SHAPE, generator=generator))


def assert_equal(captured, expected):
    assert captured.done == expected.done == {0, 1, 2, 3, 4}
    assert captured.vectors is None or captured.vectors.equal(expected.vectors)
    for name, moments in expected.frozen().items():
        assert captured.frozen()[name].n == moments.n
        assert captured.frozen()[name].mean.equal(moments.mean)
        assert captured.frozen()[name].m2.equal(moments.m2)


@pytest.mark.parametrize("within_layer", [False, True])
def test_a_batch_that_was_added_is_not_added_again(tmp_path, within_layer):
    whole = captured_set(tmp_path / "whole", within_layer=within_layer)
    add(whole, BATCHES)
    for n in range(len(BATCHES)):  # each in another process, none of which ends by itself
        captured = captured_set(tmp_path / "sums", within_layer=within_layer)
        assert captured.done == {i for batch in BATCHES[:n] for i in batch}
        add(captured, [BATCHES[n]])
    assert_equal(captured, whole)


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"", lambda d: d[:90] + b"\0" * 9])
def test_damaged_sums_are_not_gone_on_from(tmp_path, damage):
    whole, path = captured_set(tmp_path / "whole"), tmp_path / "sums"
    add(whole, BATCHES)
    add(captured_set(path), BATCHES[:2])
    path.write_bytes(damage(path.read_bytes()))
    captured = captured_set(path)
    assert not captured.done
    add(captured, BATCHES)
    assert_equal(captured, whole)
