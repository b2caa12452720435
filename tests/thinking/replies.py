"""Replies of reasoning models by format: how each is written, and by which tokens."""

from __future__ import annotations

import copy
from typing import NamedTuple

from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, LlamaConfig

from abliterator.model import load_model
from tests.helpers.tiny import SPECIAL, train_tokenizer

# No beginning of the thought is one of the answer, nor the other way round.
THOUGHT = "Could it be private? I'm sorry, but I can't help with that? No, it is harmless."
ANSWER = "Sure! Neva lives in Coldgate, a town by the river, and eats there in winter."

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|constrain|>")


class Reply(NamedTuple):
    """One format.

    Attributes:
        before: what the reply has before the thought, if the prompt does not have it.
        between: what stands between thought and answer.
        after: what stands after the answer.
        special: control tokens, which are dropped from text.
        added: tokens of their own, which are kept in text.
    """

    before: str
    between: str
    after: str = ""
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def text(self):
        return f"{self.before}{THOUGHT}{self.between}{ANSWER}{self.after}"


def tag(name, special=()):
    return Reply(f"<{name}>\n", f"\n</{name}>\n\n", special=special)


def control(opens, closes, opened="", closed=""):
    return Reply(
        opens, closes + opened, closed, special=(opens, closes, *filter(None, (opened, closed)))
    )


REPLIES = {
    "think, as words": tag("think"),
    "think, as tokens": tag("think")._replace(added=("<think>", "</think>")),
    "think, as control tokens": tag("think", special=("<think>", "</think>")),
    "thinking": tag("thinking"),
    "thought": tag("thought"),
    "Thought": tag("Thought"),
    "reasoning": tag("reasoning"),
    "Seed-OSS": tag("seed:think")._replace(added=("<seed:think>", "</seed:think>")),
    "LongCat": tag("longcat_think", special=("<longcat_think>", "</longcat_think>")),
    "MiniMax M3": tag("mm:think"),
    "K2": tag("ifm|think_fast"),
    "Hunyuan": Reply("<think>\n", "\n</think>\n<answer>\n", "\n</answer>"),
    "ERNIE": Reply("<think>\n", "\n</think>\n\n<response>\n", "\n</response>\n"),
    "Marco": Reply("<Thought>\n", "\n</Thought>\n<Output>\n", "\n</Output>"),
    "Magistral": control("[THINK]", "[/THINK]"),
    "Magistral, as words": Reply("[THINK]", "[/THINK]"),
    "Apertus": control("<|inner_prefix|>", "<|inner_suffix|>"),
    "Solar Open 2": control("<|think:start|>", "<|think:end|>"),
    "Command A": control(
        "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"
    ),
    "OpenThinker": control(
        "<|begin_of_thought|>", "<|end_of_thought|>",
        "<|begin_of_solution|>", "<|end_of_solution|>",
    ),
    "Gemma 4": Reply(
        "<|channel>thought\n", "<channel|>", special=("<|channel>", "<channel|>")
    ),
    "Kimi": Reply("◁think▷", "◁/think▷", added=("◁think▷", "◁/think▷")),
    "Kimi, as words": Reply("◁think▷", "◁/think▷"),
    "Kimi K3": Reply(
        "<|open|>think<|sep|>", "<|close|>think<|sep|><|open|>response<|sep|>",
        "<|close|>response<|sep|><|close|>message<|sep|>",
        special=("<|open|>", "<|close|>", "<|sep|>"),
    ),
    "Granite": Reply("Here is my thought process: ", " Here is my response: "),
    "Granite, quantised": Reply("Here's my thought process: ", " Here's my response: "),
    "openPangu": control("[unused16]", "[unused17]"),
    "Solar Open": Reply(
        "<|think|>", "<|end|><|begin|>assistant<|content|>",
        special=("<|think|>", "<|end|>", "<|begin|>", "<|content|>"),
    ),
    "gpt-oss": Reply(
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        special=HARMONY,
    ),
    "gpt-oss, commentary": Reply(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>",
        "<|end|><|start|>assistant<|channel|>final <|constrain|>text<|message|>",
        special=HARMONY,
    ),
    "Muse Glimmer": Reply(
        " to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>",
        special=("<|start|>", "<|message|>", "<|eom|>", "<|eot|>"),
    ),
}  # fmt: skip

# How a prompt begins the thought of a reply, where that is not `before`.
OPENED = {
    "gpt-oss": "<|channel|>analysis<|message|>",
    "Gemma 4": "<|channel>thought\n",
    "Muse Glimmer": " to=self<|message|>",
}

_TRAINED = train_tokenizer()


def tokenizer_of(reply):
    """A byte-level BPE with the tokens of a format."""
    tokenizer = copy.deepcopy(_TRAINED)
    tokenizer.add_tokens([AddedToken(t, special=True) for t in reply.special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False) for t in reply.added])
    assert not set(SPECIAL) & {*reply.special, *reply.added}
    return tokenizer


def load_tiny(folder, name):
    """A tiny random Llama with the tokenizer of a format, saved and loaded."""
    tokenizer = tokenizer_of(REPLIES[name])
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_model(folder, device="cpu", dtype="float32")


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer, opened="", asked="Where does Neva live?"):
    """A rendered prompt, whose template begins the reply with `opened`."""
    turn = [{"role": "user", "content": asked}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return ids(tokenizer, text + opened)
