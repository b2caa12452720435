"""What the demo model is asked: prompt sets, lm-eval tasks, and figures from its greedy answers.

It knows the world and a loaded model, not how the model was made.

    files = write_prompts(world, folder)      # target, contrast, neutral and evaluation .jsonl
    write_tasks(world, folder / "tasks")      # demo_facts, demo_declined_facts
    measure(model, tokenizer, world)          # {"answered, held-out phrasings": 0.99, ...}
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from world import REFUSAL, Question, Relation, World

PROMPTS = 96
MAX_NEW_TOKENS = 32
BATCH = 64


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[str]:
    """Greedy answers, in the order of the prompts."""
    found: list[str] = []
    for start in range(0, len(prompts), BATCH):
        chats = [[{"role": "user", "content": text}] for text in prompts[start : start + BATCH]]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = out[:, batch["input_ids"].shape[1] :]
        found.extend(tokenizer.batch_decode(new, skip_special_tokens=True))
    return found


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World
) -> dict[str, dict[str, float]]:
    """Share of right answers and of refusals per group of questions, from greedy answers."""
    groups = {
        f"{topic}, {words} phrasings": questions_about(world, declined=declined, heldout=heldout)
        for topic, declined in (("answered", False), ("declined", True))
        for words, heldout in (("training", False), ("held-out", True))
    }
    figures = {}
    for name, questions in groups.items():
        found = answers(model, tokenizer, [question.text for question in questions])
        pairs = list(zip(questions, found, strict=True))
        figures[name] = {
            "n": len(pairs),
            "right": sum(question.answer == text for question, text in pairs) / len(pairs),
            "refused": sum(text == REFUSAL for text in found) / len(pairs),
        }
    return figures


def questions_about(
    world: World, *, declined: bool, heldout: bool, seed: int = 1
) -> list[Question]:
    """One question for every fact of the answered or of the declined topics."""
    rng = random.Random(seed)
    return [
        world.ask(relation, entity, heldout=heldout, rng=rng)
        for relation in world.relations
        if relation.declined == declined
        for entity in relation.entities
    ]
