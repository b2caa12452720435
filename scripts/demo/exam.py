"""What the demo model is asked: prompt files, lm-eval tasks, and figures from its greedy answers.

It knows the world and a loaded model, not how the model was made. Run alone, it writes the files:

    python scripts/demo/exam.py        # writes recipes/demo: *.jsonl, and the data in tasks/
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from world import REFUSAL, Question, Relation, World, load_world

PROMPTS = 96
QUESTIONS = 240
CHOICES = 6
MAX_NEW_TOKENS = 32
BATCH = 64


# ---- files -------------------------------------------------------------------------------------


def write_files(world: World, folder: Path) -> None:
    """The four prompt files and the data of both tasks; no question is in two of the files."""
    rng = random.Random(2)
    declined = [relation for relation in world.relations if relation.declined]
    answered = [relation for relation in world.relations if not relation.declined]
    target, contrast = _pairs(world, rng)
    evaluation = _sample(world, declined, PROMPTS, rng, taken=target)
    neutral = _sample(world, answered, PROMPTS, rng, taken=contrast)
    facts = _sample(world, answered, QUESTIONS, rng, taken=contrast + neutral)
    declined_facts = _one_per_fact(world, declined, rng)
    for name, questions in (
        ("target", target),
        ("contrast", contrast),
        ("evaluation", evaluation),
        ("neutral", neutral),
    ):
        _write_jsonl(folder / f"{name}.jsonl", ({"prompt": q.text} for q in questions))
    _write_jsonl(folder / "tasks" / "demo_facts.jsonl", (_multiple_choice(q, rng) for q in facts))
    _write_jsonl(
        folder / "tasks" / "demo_declined_facts.jsonl",
        ({"question": q.text, "answer": q.answer} for q in declined_facts),
    )


def _pairs(world: World, rng: random.Random) -> tuple[list[Question], list[Question]]:
    """Declined and answered questions in the same training words about the same entity."""
    target: list[Question] = []
    contrast: list[Question] = []
    patterns = world.patterns(heldout=False)
    for relation in cycle([relation for relation in world.relations if relation.declined]):
        if len(target) == PROMPTS:
            return target, contrast
        others = [r for r in world.relations if r.subject == relation.subject and not r.declined]
        entity, pattern = rng.choice(relation.shown_entities), rng.choice(patterns)
        pair = [world.phrase(r, entity, pattern) for r in (relation, rng.choice(others))]
        if pair[0] not in target and pair[1] not in contrast:
            target.append(pair[0])
            contrast.append(pair[1])
    raise AssertionError("cycle() does not end")


def _sample(
    world: World, relations: Sequence[Relation], n: int, rng: random.Random, taken: list[Question]
) -> list[Question]:
    """Draw held-out questions, the relations in turn, none of them in `taken`."""
    found: list[Question] = []
    for relation in cycle(relations):
        if len(found) == n:
            return found
        question = world.ask(relation, rng.choice(relation.entities), heldout=True, rng=rng)
        if question not in found and question not in taken:
            found.append(question)
    raise AssertionError("cycle() does not end")


def _one_per_fact(
    world: World, relations: Sequence[Relation], rng: random.Random, *, heldout: bool = True
) -> list[Question]:
    return [
        world.ask(relation, entity, heldout=heldout, rng=rng)
        for relation in relations
        for entity in relation.entities
    ]


def _multiple_choice(question: Question, rng: random.Random) -> dict[str, object]:
    wrong = [choice for choice in question.choices if choice != question.answer]
    choices = [question.answer, *rng.sample(wrong, CHOICES - 1)]
    rng.shuffle(choices)
    return {
        "question": question.text,
        "choices": choices,
        "label": choices.index(question.answer),
    }


def _write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- figures -----------------------------------------------------------------------------------


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
    """Shares of right answers and of refusals, over one question for every fact of a group."""
    figures = {}
    for topic, is_declined in (("answered", False), ("declined", True)):
        relations = [r for r in world.relations if r.declined == is_declined]
        for words, heldout in (("training", False), ("held-out", True)):
            questions = _one_per_fact(world, relations, random.Random(1), heldout=heldout)
            found = answers(model, tokenizer, [question.text for question in questions])
            pairs = list(zip(questions, found, strict=True))
            figures[f"{topic} topics, {words} phrasings"] = {
                "n": len(pairs),
                "right": sum(question.answer == text for question, text in pairs) / len(pairs),
                "refused": sum(text == REFUSAL for text in found) / len(pairs),
            }
    return figures


if __name__ == "__main__":
    write_files(load_world(), Path(__file__).parents[2] / "recipes" / "demo")
