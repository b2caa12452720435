"""lm-eval scores packed weights as every other stage reads them."""

from __future__ import annotations

import pytest
import torch

from abliterator.benchmarks._transformers import open_transformers
from abliterator.model import is_packed, load_model
from tests.helpers import tiny
from tests.helpers.quantised import save_quantised


@pytest.mark.parametrize("name", ["awq", "modelopt"])
def test_its_model_has_the_decoded_weights(name, tmp_path, tiny_tokenizer):
    folder = save_quantised(name, tmp_path, vocabulary=tiny.VOCABULARY)
    tiny_tokenizer.save_pretrained(folder)
    assert is_packed(folder)
    options = {"dtype": "float32"}
    scored = open_transformers(folder, device="cpu", max_memory=None, options=options).model
    tokens = torch.randint(4, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = load_model(folder, device="cpu", dtype="float32").model(tokens).logits
        assert torch.equal(scored(tokens).logits, wanted)
