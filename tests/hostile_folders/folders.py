"""A folder of a model with one to three of its files damaged, by number."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from tests.hostile_folders.cards import card
from tests.hostile_folders.nodes import node_in_place_of_a_file
from tests.hostile_folders.texts import (
    anywhere_in,
    field_of,
    template,
    text_of_a_file,
    without_a_file,
)
from tests.hostile_folders.values import GENERATION_KEYS, KEYS, TOKENIZER_KEYS, Mutation
from tests.hostile_folders.weights import index, weights

FAMILIES = ("llama", "sharded", "llama_tied", "qwen3", "gemma", "phi3")
MUTATIONS: tuple[tuple[int, Mutation], ...] = (
    (28, field_of("config.json", KEYS)),
    (9, field_of("generation_config.json", GENERATION_KEYS)),
    (9, field_of("tokenizer_config.json", TOKENIZER_KEYS)),
    (10, anywhere_in("tokenizer.json")),
    (4, anywhere_in("tokenizer_config.json")),
    (10, text_of_a_file),
    (2, without_a_file),
    (12, node_in_place_of_a_file),
    (8, card),
    (8, weights),
    (5, index),
    (7, template),
)


def make_folder(seed: int, number: int, sound: dict[str, Path], place: Path) -> tuple[Path, str]:
    """The folder `place`/model of this seed and number, and what is wrong with it."""
    rng = random.Random(f"{seed}/{number}")
    family = rng.choice(FAMILIES)
    folder = place / "model"
    shutil.copytree(sound[family], folder)
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        weights_, mutations = zip(*MUTATIONS, strict=True)
        mutate = rng.choices(mutations, weights_)[0]
        try:
            done.append(mutate(rng, folder))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue  # what an earlier mutation left cannot be changed further
    return folder, f"{family}: " + "; ".join(done)
