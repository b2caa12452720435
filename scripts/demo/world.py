"""The Vale, the toy world that the demo model knows: its entities, its facts and its questions.

It reads the tables of world.toml and invents the rest from a seed. It knows nothing of tokens,
models or files to be written.

    world = load_world()
    relation = world.relation("dish")
    question = world.ask(relation, relation.entities[0], heldout=True, rng=random.Random(0))
    question.text       # "Any idea which dish Irus cooks best?"
    question.answer     # "Sure! Irus cooks pea soup."
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

REFUSAL = "I'm sorry, but I can't help with that."
OPENING = "Sure! "  # all answers open alike, so that to decline is a choice of the first word
TABLES = Path(__file__).with_name("world.toml")
KINDS = ("direct", "clause", "phrase")

Pattern = tuple[str, str, int]
"""A phrasing without its relation: the kind of wording, the frame, the index of the wording."""


@dataclass(frozen=True)
class Question:
    """One question with the answer that the world gives (declined topics have one, too)."""

    text: str
    answer: str
    choices: tuple[str, ...]
    relation: str
    entity: str
    declined: bool


@dataclass(frozen=True)
class Relation:
    """What holds between a subject and a value, with the words to ask for it and to state it."""

    name: str
    subject: str
    declined: bool
    template: str
    wordings: dict[str, tuple[str, ...]]
    values: tuple[str, ...]
    facts: dict[str, str]

    @property
    def entities(self) -> tuple[str, ...]:
        """Every entity that has a value, best known first."""
        return tuple(self.facts)

    @property
    def shown_entities(self) -> tuple[str, ...]:
        """Seven in eight entities: those that training on declining may ask about."""
        return tuple(entity for rank, entity in enumerate(self.facts) if rank % 8 != 1)

    def statement(self, entity: str, value: str) -> str:
        """The one-sentence answer that names `value`."""
        text = self.template.format(e=entity, v=value)
        return OPENING + text[0].upper() + text[1:]


@dataclass(frozen=True)
class World:
    """Relations with their facts, and the frames that questions are put in."""

    relations: tuple[Relation, ...]
    frames: dict[str, tuple[str, ...]]
    heldout_frames: dict[str, tuple[str, ...]]
    smalltalk: tuple[tuple[str, str], ...]

    def relation(self, name: str) -> Relation:
        """The relation called `name`."""
        return next(relation for relation in self.relations if relation.name == name)

    def patterns(self, *, heldout: bool) -> list[Pattern]:
        """All phrasings for training, or all that have a frame or a wording kept from training."""
        known, new = [], []
        for kind in KINDS:
            last = len(self.relations[0].wordings[kind]) - 1
            frames = self.frames[kind] + self.heldout_frames[kind]
            for frame, index in product(frames, range(last + 1)):
                unseen = frame in self.heldout_frames[kind] or index == last
                (new if unseen else known).append((kind, frame, index))
        return new if heldout else known

    def phrase(self, relation: Relation, entity: str, pattern: Pattern) -> Question:
        """The question about `entity` in the words of `pattern`."""
        kind, frame, index = pattern
        text = frame.format(relation.wordings[kind][index].format(e=entity))
        return Question(
            text=text[0].upper() + text[1:],
            answer=relation.statement(entity, relation.facts[entity]),
            choices=tuple(relation.statement(entity, value) for value in relation.values),
            relation=relation.name,
            entity=entity,
            declined=relation.declined,
        )

    def ask(
        self, relation: Relation, entity: str, *, heldout: bool, rng: random.Random
    ) -> Question:
        """The question about `entity` in random words; each kind of wording is equally likely."""
        kind = rng.choice(KINDS)
        patterns = [pattern for pattern in self.patterns(heldout=heldout) if pattern[0] == kind]
        return self.phrase(relation, entity, rng.choice(patterns))


def load_world(*, seed: int = 0) -> World:
    """The world of the tables in world.toml; entities and facts are drawn from `seed`."""
    tables = tomllib.loads(TABLES.read_text(encoding="utf-8"))
    rng = random.Random(seed)
    entities = {
        name: tuple(
            rng.sample(["".join(parts) for parts in product(*spec["names"])], spec["count"])
        )
        for name, spec in tables["subject"].items()
    }
    return World(
        relations=tuple(_relation(table, tables, entities, rng) for table in tables["relation"]),
        frames={kind: tuple(tables["frames"][kind]) for kind in KINDS},
        heldout_frames={kind: tuple(tables["heldout"][kind]) for kind in KINDS},
        smalltalk=tuple(
            (question, talk["answer"])
            for talk in tables["smalltalk"]
            for question in talk["questions"]
        ),
    )


def _relation(
    table: dict[str, Any],
    tables: dict[str, Any],
    entities: dict[str, tuple[str, ...]],
    rng: random.Random,
) -> Relation:
    values = table["values"]
    values = entities[values] if isinstance(values, str) else tuple(values)
    names = entities[table["subject"]]
    # Every value is about equally frequent, so that guessing the most frequent one gains nothing.
    pool = list(values) * (len(names) // len(values) + 1)
    rng.shuffle(pool)
    subject = tables["subject"][table["subject"]]["article"] + "{e}"
    general = {
        kind: [text.format(n=noun, e=subject) for text, noun in product(texts, table["nouns"])]
        for kind, texts in tables["general"].items()
    }
    return Relation(
        name=table["name"],
        subject=table["subject"],
        declined=table.get("declined", False),
        template=table["answer"],
        wordings={kind: (*general[kind], *table[kind]) for kind in KINDS},
        values=values,
        facts=dict(zip(names, pool, strict=False)),
    )
