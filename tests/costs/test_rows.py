"""How many sequences a device answers together."""

from __future__ import annotations

import pytest

from abliterator import costs
from abliterator.costs._rows import working_bytes

# About the sizes of Llama 3.1 8B.
MODEL = costs.ModelShape(
    matrices=(),
    n_layers=32,
    d_model=4096,
    vocabulary=128_256,
    key_width=1024,
    experts=0,
    active=0,
    parameters=8_030_000_000,
    stored=16_060_000_000,
)


def rows(memory, *, tokens=600, device="cuda", number_bytes=2.0):
    return costs.rows_that_fit(
        lambda: MODEL, tokens=tokens, device=device, memory=memory, number_bytes=number_bytes
    )


@pytest.mark.parametrize("memory", [24 << 30, 48 << 30, 80 << 30, 141 << 30])
@pytest.mark.parametrize("tokens", [64, 600, 4096])
def test_as_many_as_fit_and_no_more(memory, tokens):
    n = rows(memory, tokens=tokens)
    left = memory - MODEL.parameters * 2
    needed = working_bytes(MODEL, n, tokens, logits=n, number_bytes=2)
    assert n.bit_count() == 1  # a power of two
    assert needed < left or n == 1
    twice = working_bytes(MODEL, 2 * n, tokens, logits=2 * n, number_bytes=2)
    assert twice > 0.85 * memory - MODEL.parameters * 2 or n == 512


def test_more_memory_and_shorter_sequences_allow_more():
    assert 1 <= rows(24 << 30) < rows(48 << 30) < rows(141 << 30) <= 512
    assert rows(24 << 30, tokens=4096) < rows(24 << 30, tokens=64)
    assert rows(8 << 30) == 1  # the weights alone do not fit: loading says so


def test_a_processor_takes_sixty_four_where_they_fit_and_never_fewer_than_sixteen():
    assert rows(1 << 40, device="cpu") == 64
    assert rows(24 << 30, device="cpu") == 32
    assert rows(24 << 30, device="cpu", tokens=4096) == costs.DEFAULT_ROWS
    assert rows(8 << 30, device="cpu") == costs.DEFAULT_ROWS  # the weights alone do not fit


@pytest.mark.parametrize("device", ["mps", "xpu:0"])
def test_other_devices_take_sixteen_and_sizes_are_not_read(device):
    def unread():
        raise AssertionError

    found = costs.rows_that_fit(unread, tokens=600, device=device, memory=1 << 40, number_bytes=2)
    assert found == costs.DEFAULT_ROWS == 16
