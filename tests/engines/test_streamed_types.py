"""Every model type of the table read block by block: equal to the model in memory, or refused."""

from __future__ import annotations

import pytest
import torch

from abliterator.engines import AnswerPath, TransformersEngine, WriterEdit, open_streamed
from abliterator.errors import UnsupportedModel
from abliterator.model import LoadedModel
from tests.anatomy.test_architectures import NAMES, basis, planned, vanilla
from tests.helpers.architectures import save

pytestmark = pytest.mark.slow  # all together

PROMPTS = [[0, *range(4, 4 + n)] for n in (5, 9, 5)]

REFUSED = {"youtu": "sets the embedding of its padding token to 0"}


def measured(engine, plan):
    """Residuals of each layer, and logits along paths under an edit."""
    tables = [states for _, states in engine.hidden_states(PROMPTS)]
    paths = [AnswerPath(tuple(prompt), 3) for prompt in PROMPTS]
    with engine.edited(WriterEdit(plan, basis())):
        tables += [logits for _, logits in engine.logits(paths, max_batch_tokens=64)]
    return tables


# Types whose buffers, fused weights or states depend on the dtype.
ROUNDED = (
    *("codegen", "deepseek_v3", "deepseek_v4", "gemma3_text", "glm5_next", "gpt_oss", "gptj"),
    *("hy_v4", "mamba2"),
)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in NAMES), *((name, "bfloat16") for name in ROUNDED)],
)
def test_read_block_by_block_every_bit_is_the_same(name, dtype, tmp_path, tiny_tokenizer):
    _, plan = planned(save(name, tmp_path))
    tiny_tokenizer.save_pretrained(tmp_path)
    if name in REFUSED:
        with pytest.raises(UnsupportedModel, match=REFUSED[name]):
            open_streamed(tmp_path, device="cpu", dtype=dtype)
        return
    engine = open_streamed(tmp_path, device="cpu", dtype=dtype, activation_bytes=4096)
    model = vanilla(tmp_path, dtype=getattr(torch, dtype)).requires_grad_(False)
    in_memory = TransformersEngine(LoadedModel(model, tiny_tokenizer, tmp_path, "cpu"))
    pairs = zip(measured(engine, plan), measured(in_memory, plan), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
