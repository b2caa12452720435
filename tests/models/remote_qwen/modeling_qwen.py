"""A small model with Qwen 1's module names, whose blocks return tuples, for these tests only.

Copied into a checkpoint folder and loaded through auto_map, as remote code is.
"""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class QWenConfig(PretrainedConfig):
    model_type = "qwen"
    tie_word_embeddings = False


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotated(x, start, base):
    """Rotary positions from `start` on, on [batch, heads, length, width]."""
    half = x.shape[-1] // 2
    positions = torch.arange(start, start + x.shape[2], dtype=torch.float32)
    angles = torch.outer(positions, base ** -(torch.arange(half) / half))
    turn = torch.polar(torch.ones_like(angles), angles)
    turned = torch.complex(x[..., :half].float(), x[..., half:].float()) * turn
    return torch.cat((turned.real, turned.imag), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.heads, self.index = config.num_attention_heads, index
        self.base = config.rotary_emb_base
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, mask, cache):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        start = cache.get_seq_length(self.index) if cache is not None else 0
        q, k = rotated(q, start, self.base), rotated(k, start, self.base)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(out.transpose(1, 2).reshape(batch, length, width)), None


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size // 2, bias=False)
        self.w2 = nn.Linear(config.hidden_size, config.intermediate_size // 2, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size // 2, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class Block(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.ln_1, self.ln_2 = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)
        self.attn, self.mlp = Attention(config, index), MLP(config)

    def forward(self, x, mask, cache):
        x = x + self.attn(self.ln_1(x), mask, cache)[0]
        return (x + self.mlp(self.ln_2(x)), None)


class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True


class QWenModel(QWenPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **_):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = input_ids.shape[1]
        mask = torch.ones(length, seen + length, dtype=torch.bool).tril(seen)[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None]
            mask = mask | ~mask.any(-1, keepdim=True)  # a row of padding attends to anything
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x, mask, past_key_values if use_cache else None)[0]
        return BaseModelOutputWithPast(self.ln_f(x), past_key_values)


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **_):
        output = self.transformer(input_ids, attention_mask, past_key_values, use_cache)
        return CausalLMOutputWithPast(None, self.lm_head(output[0]), output.past_key_values)
