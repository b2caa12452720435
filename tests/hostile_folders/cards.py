"""Cards of a base whose header claims too much, or that none can read."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.hostile_folders.texts import clear


def _aliases(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join([*lines, f"base_model: *a{levels - 1}"])


CARDS: dict[str, Callable[[], str]] = {
    "aliases": lambda: _aliases(9),
    "a merge of itself": lambda: "a: &a\n  <<: *a\nbase_model: x",
    "a list of itself": lambda: "language: &a [*a]",
    "deep lists": lambda: "language: " + "[" * 5000,
    "deep blocks": lambda: "\n".join(" " * i + "a:" for i in range(3000)),
    "a date that is none": lambda: "license: 2024-02-31",
    "a date": lambda: "license: 2024-02-03\nbase_model: [2024-02-03]",
    "a tag": lambda: "license: !!python/object/apply:os.system ['true']",
    "binary": lambda: "license: !!binary aGVsbG8=",
    "a list": lambda: "- a\n- b",
    "a text": lambda: "just words",
    "keys that are none": lambda: "? [a, b]\n: c\n? {a: b}\n: d",
    "numbers": lambda: "license: 3\nlanguage: 4\nbase_model: 5\nextra_gated_prompt: 6",
    "gating of every kind": lambda: (
        "extra_gated_fields: {a: {type: select, options: [1, .nan]}}\nextra_gated_x: 2024-02-03\n"
        "extra_gated_y: !!set {a, b}\nextra_gated_z: .inf"
    ),
    "a surrogate": lambda: 'license: "\\ud800"\nbase_model: "\\udfff"',
    "escapes": lambda: 'license: "mit\\e[2J"\nbase_model: ["a\\nb"]\nlanguage: ["\\0"]',
    "a long text": lambda: "license: " + "x" * 3_000_000,
    "a long number": lambda: "license_name: " + "9" * 6000,
    "no": lambda: "license: no\nlanguage: [no, yes, ~]",
    "sixty": lambda: "license: 190:20:30\nlanguage: [0x_, 1_0]",
    "an open quote": lambda: 'license: "mit',
    "tabs": lambda: "license:\n\t- mit",
}


def card(rng: random.Random, folder: Path) -> str:
    """A README.md with hostile front matter."""
    kind = rng.choice(sorted(CARDS))
    clear(folder / "README.md")
    (folder / "README.md").write_text(f"---\n{CARDS[kind]()}\n---\n\n# A model\n", encoding="utf-8")
    return f"README.md: {kind}"
