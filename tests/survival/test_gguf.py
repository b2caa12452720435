"""Numbers read back from GGUF files that the package gguf wrote, as llama.cpp's converter does."""

from __future__ import annotations

import pytest

from abliterator.checkpoint import Checkpoint
from abliterator.errors import QuantizationError
from abliterator.survival import write_numbers
from tests.survival.models import save_model, weights_of, write_gguf


def test_numbers_have_the_checkpoints_names_and_order_of_rows(tmp_path):
    source = Checkpoint.open(save_model(tmp_path / "base", shard_size="60KB"))
    write_numbers(source, write_gguf(source.folder, tmp_path / "q.gguf"), tmp_path / "numbers")
    base, read = weights_of(source.folder), weights_of(tmp_path / "numbers")
    assert Checkpoint.open(tmp_path / "numbers").tensors == source.tensors
    for name, before in base.items():
        step = before.float().unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
        distance = (read[name].float() - before.float()).unflatten(-1, (-1, 32)).abs()
        assert (distance <= step * 0.51 + before.abs().max() * 2**-8).all(), name


def test_a_tensor_in_another_order_is_noticed(tmp_path):
    source = Checkpoint.open(save_model(tmp_path / "base"))
    gguf = write_gguf(source.folder, tmp_path / "q.gguf", swapped="blk.1.attn_q.weight")
    with pytest.raises(QuantizationError, match=r"another tensor model\.layers\.1\.self_attn\.q"):
        write_numbers(source, gguf, tmp_path / "numbers")


def test_what_is_no_gguf_file_is_an_error(tmp_path):
    source = Checkpoint.open(save_model(tmp_path / "base"))
    (tmp_path / "q.gguf").write_bytes(bytes(64))
    with pytest.raises(QuantizationError, match=r"does not read q\.gguf"):
        write_numbers(source, tmp_path / "q.gguf", tmp_path / "numbers")
