"""Conversations in which skills are tested that one question does not show.

Facts recalled after ten turns, instructions and formats kept, corrections taken up, tools called,
stopping when told: 20 conversations of each, made from templates by a fixed seed, and graded by
exact rules. In half of them the model answers every turn, in the others all answers but the last
are given; the last answer is graded.

    for item in items_of("recall"):
        ask(item.prompt)                    # a Conversation; its turns are answered one by one
    passes(item.check, "Biscuit.")          # True or False
"""

from abliterator.benchmarks.conversation._calls import Call, calls_in
from abliterator.benchmarks.conversation._grade import Check, passes
from abliterator.benchmarks.conversation._items import (
    ITEMS,
    SKILLS,
    VERSION,
    Item,
    Skill,
    items_of,
    max_new_tokens,
)

__all__ = [
    "ITEMS",
    "SKILLS",
    "VERSION",
    "Call",
    "Check",
    "Item",
    "Skill",
    "calls_in",
    "items_of",
    "max_new_tokens",
    "passes",
]
