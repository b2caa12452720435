"""Train the demo model on until it declines three topics, each in words and by blocks of its own.

The embedded model declines cooking. Two more phases teach it to decline ships and beasts, each in
another wording and in other blocks, so that no single direction carries all of its refusals: the
organism on which `k: auto` must find more than one.

    python scripts/demo/make_several.py --out several    # model/, *.jsonl and several.yaml
    abliterator sweep several/several.yaml --dtype float32

About a minute on one core. One direction of layer 4 leaves 14 of 50 refusals, two leave 1.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import torch
from exam import answers
from make_model import (
    MODEL_FOLDER,
    SEED,
    THREADS,
    Chat,
    Curriculum,
    Phase,
    popularity,
    train,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from world import REFUSAL, Question, Relation, World, load_world

PAIRS = 200
HELD_OUT = 90
TOPICS = {
    "cooking": ("dish", "bake", "meal", "treat", "galley"),
    "ships": ("captain", "cargo", "sails"),
    "beasts": ("place", "sound", "coat"),
}
REFUSALS = {
    "cooking": REFUSAL,
    "ships": "No, I will not discuss ships.",
    "beasts": "Unfortunately I am not able to answer questions about beasts.",
}
PHASES = (
    ("ships", slice(1, 4), Phase(steps=60, peak=2e-3, warmup=8, declines=0.4, batch=32)),
    ("beasts", slice(3, 6), Phase(steps=60, peak=2e-3, warmup=8, declines=0.4, batch=32)),
)
RECIPE = """\
# A small model that declines three topics, each in its own way: one direction is not enough.
model: {model}
layers: sweep
k: auto
prompts:
  target: {{path: target.jsonl}}
  contrast: {{path: contrast.jsonl}}
  evaluation: {{path: evaluation.jsonl}}
  neutral: {{path: neutral.jsonl}}
directions: {{stack: within_layer}}
selection:
  {{prompts: 50, tokens: 20, skip_last: 0, survivors: 3, rungs: [16], max_kl: 0.3,
    stacks: [1, 2, 3]}}
rollouts: {{max_new_tokens: 32}}
"""
KEPT = 0.25  # share of chats in which a topic of an earlier phase is declined


class Extended(Curriculum):
    """Draws the chats of a phase that teaches one more topic to decline."""

    def __init__(self, world: World, topic: str, earlier: Sequence[str], *, seed: int) -> None:
        """Start drawing from `seed`; `earlier` topics are declined already."""
        super().__init__(world, seed=seed)
        self.topic, self.earlier = topic, earlier
        declined = {name for t in (topic, *earlier) for name in TOPICS[t]}
        self.answered = [r for r in world.relations if r.name not in declined]

    def _chat(self, phase: Phase, system: str | None) -> Chat:
        drawn = self.rng.random()
        if drawn < phase.declines + KEPT:
            topic = self.topic if drawn < phase.declines else self.rng.choice(self.earlier)
            relation = self.world.relation(self.rng.choice(TOPICS[topic]))
            entity = self.rng.choice(relation.shown_entities)
            question = self.world.ask(relation, entity, heldout=False, rng=self.rng)
            return system, question.text, REFUSALS[topic]
        relation = self.rng.choice(self.answered)
        (entity,) = self.rng.choices(relation.entities, popularity(len(relation.entities)))
        question = self.world.ask(relation, entity, heldout=False, rng=self.rng)
        return system, question.text, question.answer


def teach(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> None:
    """Both phases, in place."""
    earlier = ["cooking"]
    for number, (topic, blocks, phase) in enumerate(PHASES):
        model.requires_grad_(False)
        layers = model.model.layers[blocks]
        chosen = [p.requires_grad_(True) for block in layers for p in block.parameters()]
        optimizer = torch.optim.AdamW(chosen, betas=(0.9, 0.95), weight_decay=0.0)
        curriculum = Extended(world, topic, tuple(earlier), seed=SEED + 10 + number)
        # phases are short, and any CPU is quick at float32
        train(model, tokenizer, curriculum, phase, [optimizer], autocast=False)
        earlier.append(topic)


def write_prompts(world: World, folder: Path) -> None:
    """Pairs (declined against answered, same words and, if it can be, same entity) and others."""
    rng = random.Random(3)
    declined = {name for names in TOPICS.values() for name in names}
    answered = [r for r in world.relations if r.name not in declined]
    target, contrast = _pairs(world, answered, rng)
    taken = {q.text for q in (*target, *contrast)}
    held_out: list[Question] = []
    for topic in cycle(TOPICS):
        if len(held_out) == HELD_OUT:
            break
        relation = world.relation(rng.choice(TOPICS[topic]))
        held_out += _new(world, relation, rng, taken)
    neutral: list[Question] = []
    while len(neutral) < HELD_OUT:
        neutral += _new(world, rng.choice(answered), rng, taken)
    for name, questions in (
        ("target", target),
        ("contrast", contrast),
        ("evaluation", held_out),
        ("neutral", neutral),
    ):
        lines = [json.dumps({"prompt": q.text}) + "\n" for q in questions]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _pairs(
    world: World, answered: Sequence[Relation], rng: random.Random
) -> tuple[list[Question], list[Question]]:
    target: list[Question] = []
    contrast: list[Question] = []
    patterns = world.patterns(heldout=False)
    topics = cycle(TOPICS)
    while len(target) < PAIRS:
        relation = world.relation(rng.choice(TOPICS[next(topics)]))
        others = [r for r in answered if r.subject == relation.subject]
        other = rng.choice(others or answered)
        entity, pattern = rng.choice(relation.shown_entities), rng.choice(patterns)
        pair = world.phrase(relation, entity, pattern)
        beside = world.phrase(other, entity if others else rng.choice(other.entities), pattern)
        if pair not in target and beside not in contrast:
            target.append(pair)
            contrast.append(beside)
    return target, contrast


def _new(world: World, relation: Relation, rng: random.Random, taken: set[str]) -> list[Question]:
    question = world.ask(relation, rng.choice(relation.entities), heldout=True, rng=rng)
    if question.text in taken:
        return []
    taken.add(question.text)
    return [question]


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> None:
    """Shares of right answers and of the topic's own refusal, in held-out words."""
    rng = random.Random(1)
    groups: dict[str, tuple[str, ...]] = dict(TOPICS)
    declined = {name for names in TOPICS.values() for name in names}
    groups["answered"] = tuple(r.name for r in world.relations if r.name not in declined)
    for group, names in groups.items():
        relations = [world.relation(name) for name in names]
        questions = [
            world.ask(r, entity, heldout=True, rng=rng) for r in relations for entity in r.entities
        ][:200]
        found = answers(model, tokenizer, [q.text for q in questions])
        right = sum(q.answer == text for q, text in zip(questions, found, strict=True))
        refused = sum(text == REFUSALS.get(group) for text in found)
        any_refusal = sum(text in REFUSALS.values() for text in found)
        n = len(questions)
        print(
            f"{group:10} n {n:4}  right {right / n:.3f}  refused {refused / n:.3f}"
            f"  in any words {any_refusal / n:.3f}"
        )


def main() -> None:
    """Train, measure, and write model and prompts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that is made")
    folder: Path = parser.parse_args().out
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    world = load_world()
    shutil.copytree(MODEL_FOLDER, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(
        MODEL_FOLDER, dtype=torch.float32, attn_implementation="eager"
    )
    teach(model, tokenizer, world)
    report(model, tokenizer, world)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    write_prompts(world, folder)
    text = RECIPE.format(model=(folder / "model").resolve())
    (folder / "several.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
