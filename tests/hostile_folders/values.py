"""Values of every wrong type and size, and keys at which a model's files may hold them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, Path], str]


def deep(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**4, 10**6, 10**9, 2**31, 2**63, 10**18, 10**40),
    *(-(10**9), 0.0, 0.5, -1.5, 1e308, math.inf, -math.inf, math.nan, 32.0),
    *("", "3", "a", "llama", "float32", "bfloat16", "auto", "\ud800", "\0", "a\nb", "\x1b[2J"),
    *("../../etc/passwd", "x" * 5000, "{{ 1/0 }}", "torch.float99"),
)
CONTAINERS: tuple[Any, ...] = (
    *([], {}, [None], [1, "a"], ["a", "b"], [0] * 3, [2.5], [[1]], [{}], {"a": 1}, {"": None}),
    *(["full_attention"] * 3, ["sliding_attention"], {"rope_type": "default"}, {"rope_type": 3}),
    *({"rope_type": "yarn", "factor": 0}, {"rope_type": "linear"}, {"rope_theta": "x"}),
    *({"quant_method": "fp8"}, {"quant_method": []}, {"model_type": "llama"}, deep(50)),
)
KEYS = (
    *("attention_bias", "mlp_bias", "attention_dropout", "head_dim", "hidden_act", "hidden_size"),
    *("hidden_activation", "initializer_range", "intermediate_size", "max_position_embeddings"),
    *("model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    *("rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings"),
    *("vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
    *("torch_dtype", "architectures", "auto_map", "quantization_config", "sliding_window"),
    *("layer_types", "max_window_layers", "partial_rotary_factor", "transformers_version"),
    *("is_encoder_decoder", "is_decoder", "output_attentions", "output_hidden_states"),
    *("return_dict", "attn_implementation", "_attn_implementation", "text_config", "num_experts"),
    *("num_local_experts", "n_routed_experts", "num_nextn_predict_layers", "id2label", "label2id"),
    *("num_labels", "problem_type", "chunk_size_feed_forward", "torchscript", "use_bfloat16"),
    *("cross_attention_hidden_size", "add_cross_attention", "tokenizer_class", "prefix"),
    *("generation_config", "pruned_heads", "base_model_tp_plan", "transformers_weights"),
    *("per_layer_config", "vision_config", "sub_configs", "attribute_map", "name_or_path"),
)
GENERATION_KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "min_length", "do_sample"),
    *("temperature", "top_p", "top_k", "num_beams", "num_return_sequences", "use_cache"),
    *("repetition_penalty", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *("cache_implementation", "cache_config", "watermarking_config", "compile_config"),
    *(
        "max_new_tokens",
        "stop_strings",
        "output_scores",
        "return_dict_in_generate",
        "penalty_alpha",
    ),
    *("assistant_early_exit", "prompt_lookup_num_tokens", "custom_generate", "max_time"),
)
TOKENIZER_KEYS = (
    *("tokenizer_class", "model_max_length", "bos_token", "eos_token", "pad_token", "unk_token"),
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "auto_map"),
    *("chat_template", "clean_up_tokenization_spaces", "add_bos_token", "add_eos_token", "legacy"),
    *("padding_side", "truncation_side", "model_input_names", "split_special_tokens", "backend"),
    *("use_fast", "is_local", "processor_class", "response_schema", "vocab_file", "merges_file"),
    *("tokenizer_file", "name_or_path", "special_tokens_map_file", "add_prefix_space"),
)
TOKENIZER_CLASSES = (
    *("LlamaTokenizer", "GPT2Tokenizer", "T5Tokenizer", "BertTokenizer", "Qwen2Tokenizer"),
    *("PreTrainedTokenizerFast", "NoSuchTokenizer", "CanineTokenizer", "ByT5Tokenizer"),
    *("MistralCommonTokenizer", "XLMRobertaTokenizer", "GemmaTokenizerFast", "TokenizersBackend"),
)
TEMPLATES = (
    *("", " ", "{{ 1/0 }}", "{{", "{% for %}", "{{ messages[99].content }}", "{{ x.y.z }}"),
    *("{{ raise_exception('no') }}", "{{ messages }}", "fixed", "{{ bos_token * 100 }}"),
    *("{{ messages[0]['content'] | tojson | upper }}", "{{ ''.__class__.__mro__ }}", "\0"),
    *("{{ 'a' * 10**10 }}", "{% include 'x' %}", "{{ strftime_now(3) }}", "{{ 10 ** 10 ** 8 }}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages | no_such_filter }}"),
    *("{% for a in range(10**9) %}{% endfor %}", "{{ ('x' ~ messages[0].content) * 3000 }}"),
    *("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "{{ [] | first }}", "{{ [] | random }}"),
    *("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "{{ none + 1 }}"),
    *("{%- for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", "é\u2028\ufeff"),
)


def hostile(rng: random.Random) -> Any:
    """A value of some type, rarely the one that is wanted."""
    return rng.choice(SCALARS) if rng.random() < 0.6 else rng.choice(CONTAINERS)


def brief(value: Any) -> str:
    """A value for a label: ASCII, at most 60 characters."""
    try:
        text = ascii(value)
    except RecursionError:
        text = f"a deep {type(value).__name__}"
    return text if len(text) <= 60 else text[:59] + "~"
