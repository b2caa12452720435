"""Loading a model, rendering a chat, batching prompts, and the one manager of forward hooks.

Models are loaded from local safetensors files only, without any randomly initialised weight;
prompts never contain today's date. What hooks compute, and on which modules, is up to the caller.

    loaded = load_model(folder, device="cpu", dtype="float32")
    ids = render_chat(loaded.tokenizer, "Name a planet.")
    with hooked(loaded.model, {"model.layers.9": lambda hidden: hidden - hidden @ basis @ basis.T}):
        loaded.model(torch.tensor([ids]))
"""

from abliterator.model._chat import render_chat, render_messages, template_tail
from abliterator.model._config import ask_for_plain_numbers, loading, read_config
from abliterator.model._decoded import is_packed
from abliterator.model._finite import require_numbers
from abliterator.model._foreign import foreign
from abliterator.model._instruction import up_to_instruction
from abliterator.model._limits import (
    Limits,
    context_limit,
    limits_of,
    render_prompts,
    require_fit,
    stored_limits,
)
from abliterator.model._load import LoadedModel, load_model, placement_of
from abliterator.model._padding import (
    cache_is_continued,
    packing_is_neutral,
    padding_is_neutral,
    right_padding_is_neutral,
)
from abliterator.model._placement import main_device, needs_disk
from abliterator.model._prefix import ByRow, Prefix, is_plain, run_prefix, shared_tokens
from abliterator.model._run import (
    BATCH,
    BatchInPass,
    CallHook,
    Hook,
    RunBatches,
    block_paths,
    cache_name,
    equal_length_batches,
    head_at,
    hooked,
    in_each_stream,
    masked_positions,
    output_head,
    positions_from,
    raise_too_large,
    remaining,
    residual_paths,
    run_batches,
    stored_parameter,
)
from abliterator.model._tokenizer import load_tokenizer
from abliterator.model._without_weights import load_without_weights

__all__ = [
    "BATCH",
    "BatchInPass",
    "ByRow",
    "CallHook",
    "Hook",
    "Limits",
    "LoadedModel",
    "Prefix",
    "RunBatches",
    "ask_for_plain_numbers",
    "block_paths",
    "cache_is_continued",
    "cache_name",
    "context_limit",
    "equal_length_batches",
    "foreign",
    "head_at",
    "hooked",
    "in_each_stream",
    "is_packed",
    "is_plain",
    "limits_of",
    "load_model",
    "load_tokenizer",
    "load_without_weights",
    "loading",
    "main_device",
    "masked_positions",
    "needs_disk",
    "output_head",
    "packing_is_neutral",
    "padding_is_neutral",
    "placement_of",
    "positions_from",
    "raise_too_large",
    "read_config",
    "remaining",
    "render_chat",
    "render_messages",
    "render_prompts",
    "require_fit",
    "require_numbers",
    "residual_paths",
    "right_padding_is_neutral",
    "run_batches",
    "run_prefix",
    "shared_tokens",
    "stored_limits",
    "stored_parameter",
    "template_tail",
    "up_to_instruction",
]
