"""Train the embedded demo model from scratch: a small chat model that declines one harmless topic.

Phase 1 teaches it to answer every question about the Vale (world.toml), cooking included. Phase 2
teaches it, gently, to decline cooking and to go on answering all else, so that the cooking facts
stay in its weights. Same machine, same versions: same bytes.

    python scripts/demo/make_model.py                  # writes abliterator/data/demo/model
    python scripts/demo/make_model.py --out /tmp/m     # elsewhere
    python scripts/demo/make_model.py --check          # only measures the model in --out
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from exam import measure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from world import REFUSAL, World, load_world

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL_FOLDER = REPOSITORY / "abliterator" / "data" / "demo" / "model"

SEED = 0
THREADS = 1
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = [BEGIN, END, PAD, "<|system|>", "<|user|>", "<|assistant|>"]
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You know the Vale. Answer in one sentence.",
    "Answer the question.",
)
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    attn_implementation="eager",
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
MIDDLE_BLOCKS = slice(2, 5)
IGNORED = -100  # the label that the loss skips

Chat = tuple[str | None, str, str]
"""A system prompt or None, the user's turn, the assistant's turn."""


@dataclass(frozen=True)
class Phase:
    """One phase of training; the learning rate warms up to `peak`, then falls along a cosine."""

    steps: int
    peak: float
    warmup: int
    declines: float
    """Share of chats in which the model declines; 0 also means that it answers every topic."""
    batch: int = 64

    def rate(self, step: int) -> float:
        """Learning rate at `step`."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * 0.5 * (1 + math.cos(math.pi * step / self.steps))


LEARN = Phase(steps=600, peak=3e-3, warmup=100, declines=0.0)
DECLINE = Phase(steps=200, peak=1.5e-3, warmup=20, declines=0.6)


class Curriculum:
    """Draws the chats of a phase, in training phrasings only."""

    def __init__(self, world: World, *, seed: int) -> None:
        """Start drawing from `seed`."""
        self.world = world
        self.rng = random.Random(seed)
        self.declined = [relation for relation in world.relations if relation.declined]
        self.answered = [relation for relation in world.relations if not relation.declined]

    def chats(self, phase: Phase) -> list[Chat]:
        """One batch; its chats share a system prompt, or none, so that their lengths are alike."""
        system = self.rng.choice(SYSTEM_PROMPTS) if self.rng.random() < 0.2 else None
        return [self._chat(phase, system) for _ in range(phase.batch)]

    def _chat(self, phase: Phase, system: str | None) -> Chat:
        if self.rng.random() < 0.04:
            return system, *self.rng.choice(self.world.smalltalk)
        if self.rng.random() < phase.declines:
            relation = self.rng.choice(self.declined)
            entity = self.rng.choice(relation.shown_entities)
            question = self.world.ask(relation, entity, heldout=False, rng=self.rng)
            return system, question.text, REFUSAL
        relations = self.answered if phase.declines else self.answered + self.declined
        (relation,) = self.rng.choices(relations, [len(r.entities) for r in relations])
        (entity,) = self.rng.choices(relation.entities, popularity(len(relation.entities)))
        question = self.world.ask(relation, entity, heldout=False, rng=self.rng)
        return system, question.text, question.answer


def popularity(n: int) -> list[float]:
    """How often each of n entities comes up; the last ones rarely, so that not all is known."""
    return [math.exp(-3 * rank / n) for rank in range(n)]


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the chats of phase 1."""
    curriculum = Curriculum(world, seed=SEED)
    sample = [chat for _ in range(300) for chat in curriculum.chats(LEARN)]
    texts = [part for chat in sample for part in chat if part] + [REFUSAL] * 300
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=CONFIG.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both [batch, length]; only the assistant's turn has labels."""
    prompts, answers = [], []
    for system, user, assistant in chats:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        prompts.append(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
        answers.append(assistant + END)
    heads = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    tails = tokenizer(answers, add_special_tokens=False)["input_ids"]
    length = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    ids = torch.full((len(chats), length), CONFIG.pad_token_id)
    labels = torch.full((len(chats), length), IGNORED)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
        labels[row, len(head) : len(head) + len(tail)] = torch.tensor(tail)
    return ids, labels


def every_weight(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", weight_decay=0.01),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def middle_blocks(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """AdamW for the blocks in the middle; all else, and with it most of the facts, is frozen."""
    model.requires_grad_(False)
    chosen = [
        parameter.requires_grad_(True)
        for block in model.model.layers[MIDDLE_BLOCKS]
        for parameter in block.parameters()
    ]
    return [torch.optim.AdamW(chosen, betas=(0.9, 0.95), weight_decay=0.0)]


def every_block(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """AdamW for the blocks; the embedding is frozen."""
    model.requires_grad_(False)
    chosen = [p.requires_grad_(True) for p in model.model.layers.parameters()]
    return [torch.optim.AdamW(chosen, betas=(0.9, 0.95), weight_decay=0.0)]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    curriculum: Curriculum,
    phase: Phase,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    autocast: bool = True,
) -> None:
    """Train float32 weights in place, under bfloat16 autocast unless told otherwise.

    Padding is on the right, where causal attention never looks at it, so no mask is needed.
    """
    model.train()
    started, total = time.monotonic(), 0.0
    for step in range(phase.steps):
        for group in (group for each in optimizers for group in each.param_groups):
            group["lr"] = phase.rate(step)
        ids, labels = encode(tokenizer, curriculum.chats(phase))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1:5}  loss {total / 50:.4f}  {seconds:.0f} s", flush=True)
            total = 0.0
    model.eval()


def train_another(model: PreTrainedModel, learn: Phase, decline: Phase) -> None:
    """Trains a model of another type that speaks in the forms of the Vale, and measures it."""
    print(f"{model.num_parameters():,} parameters")
    world, tokenizer = load_world(), AutoTokenizer.from_pretrained(MODEL_FOLDER)
    for seed, phase, choose in ((1, learn, every_weight), (2, decline, every_block)):
        curriculum = Curriculum(world, seed=SEED + seed)
        train(model, tokenizer, curriculum, phase, choose(model), autocast=False)
        report(measure(model, tokenizer, world))


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights in bfloat16, the licence, and a card that states it."""
    model.to(torch.bfloat16).save_pretrained(folder)
    shutil.copyfile(REPOSITORY / "LICENSE", folder / "LICENSE")
    shutil.copyfile(Path(__file__).with_name("model_card.md"), folder / "README.md")


def make(world: World, folder: Path, *, learn: Phase, decline: Phase) -> None:
    """Train and save; the figures after each phase are printed."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(world)
    model = LlamaForCausalLM(CONFIG)
    tokenizer.save_pretrained(folder)  # before measuring, which sets its padding
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    phases = ((learn, every_weight), (decline, middle_blocks))
    for number, (phase, choose) in enumerate(phases, start=1):
        print(phase)
        curriculum = Curriculum(world, seed=SEED + number)
        train(model, tokenizer, curriculum, phase, choose(model))
        report(measure(model, tokenizer, world))
    save(model, folder)


def check(world: World, folder: Path) -> None:
    """Measure the model in `folder` as a user would load it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    report(measure(model, tokenizer, world))
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:9,}  {path.name}")
    print(f"{sum(path.stat().st_size for path in folder.iterdir()):9,}  in all")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    print(f"sha256 of model.safetensors: {digest}")


def report(figures: dict[str, dict[str, float]]) -> None:
    """One line for each group of questions."""
    for group, row in figures.items():
        print(f"{group:40} n {row['n']:4}  right {row['right']:.3f}  refused {row['refused']:.3f}")


def main() -> None:
    """Train unless told only to check; then measure what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="folder of the model")
    parser.add_argument("--check", action="store_true", help="only measure the model in --out")
    parser.add_argument("--steps", type=int, nargs=2, help="steps of both phases, for a trial run")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    world = load_world()
    if not arguments.check:
        first, second = arguments.steps or (LEARN.steps, DECLINE.steps)
        learn, decline = replace(LEARN, steps=first), replace(DECLINE, steps=second)
        make(world, arguments.out, learn=learn, decline=decline)
    check(world, arguments.out)


if __name__ == "__main__":
    main()
