"""Damage to one file: a field of its JSON, its text, its template, or that it is not there."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.hostile_folders.values import TEMPLATES, TOKENIZER_CLASSES, Mutation, brief, hostile

WEIGHTS = "model.safetensors"


def read(path: Path) -> Any:
    """The value of a JSON file, or an empty object."""
    if not path.is_file():  # an earlier change may have put a pipe there, whose reading never ends
        return {}
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def write(path: Path, value: Any) -> None:
    """Writes a JSON file, lone surrogates as escapes; what stood there before goes."""
    clear(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def clear(path: Path) -> None:
    """Removes whatever is at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def field_of(file: str, keys: tuple[str, ...]) -> Mutation:
    """A key of a JSON file gets another value, or goes."""

    def mutate(rng: random.Random, folder: Path) -> str:
        values = read(folder / file)
        if not isinstance(values, dict):
            values = {}
        key = rng.choice(sorted({*keys, *values}))
        if key in values and rng.random() < 0.1:
            del values[key]
            write(folder / file, values)
            return f"{file}: no {key}"
        value = hostile(rng)
        if key == "tokenizer_class" and rng.random() < 0.7:
            value = rng.choice(TOKENIZER_CLASSES)
        if key == "chat_template" and rng.random() < 0.7:
            value = rng.choice(TEMPLATES)
        if isinstance(values.get(key), dict) and values[key] and rng.random() < 0.5:
            inner = rng.choice(sorted(values[key]))
            values[key] = {**values[key], inner: value}
            key = f"{key}.{inner}"
        else:
            values[key] = value
        write(folder / file, values)
        return f"{file}: {key} = {brief(value)}"

    return mutate


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values in a JSON value; of long lists and objects, to the first few."""
    yield where
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = list(value.items())[:12]
    elif isinstance(value, list):
        pairs = list(enumerate(value))[:6]
    for key, inner in pairs:
        yield from places(inner, (*where, key))


def anywhere_in(file: str) -> Mutation:
    """Some value deep in a JSON file becomes another."""

    def mutate(rng: random.Random, folder: Path) -> str:
        values = read(folder / file)
        where = rng.choice(list(places(values)))
        new = hostile(rng)
        if not where:
            values = new
        else:
            inner = values
            for key in where[:-1]:
                inner = inner[key]
            inner[where[-1]] = new
        write(folder / file, values)
        return f"{file}: {'/'.join(map(str, where))[:80]} = {brief(new)}"

    return mutate


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "space": b" \n",
    "null": b"null",
    "number": b"3",
    "list": b"[]",
    "object": b"{}",
    "binary": bytes(range(256)) * 4,
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a surrogate": b'{"a": "\\ud800", "\\udfff": 1}',
    "a long number": b'{"vocab_size": ' + b"9" * 6000 + b"}",
    "a name twice": b'{"vocab_size": 3, "vocab_size": 4}',
    "not a number": b'{"vocab_size": NaN}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
}
SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "vocab.txt", "README.md", "tekken.json"),
    *("preprocessor_config.json", "processor_config.json", "additional_chat_templates/a.jinja"),
    *("model.safetensors.index.json", "LICENSE", "modeling_x.py", "adapter_config.json"),
    *("hf_quant_config.json", "generation_config_x.json", "tokenizer.jsn", "quantize_config.json"),
)


def text_of_a_file(rng: random.Random, folder: Path) -> str:
    """A small file, there or not, gets other content, or is cut."""
    file = rng.choice(SMALL_FILES)
    path = folder / file
    kind = rng.choice([*sorted(TEXTS), "cut", "flipped"])
    old = path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 24 else b"{}"
    if kind == "cut":
        data = old[: rng.randrange(len(old) + 1)]
    elif kind == "flipped":
        changed = bytearray(old or b"x")
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        data = bytes(changed)
    else:
        data = TEXTS[kind]
    clear(path)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return f"{file}: {kind}"


def without_a_file(rng: random.Random, folder: Path) -> str:
    """A file that is there goes."""
    file = rng.choice(sorted(path.name for path in folder.iterdir() if not path.is_dir()))
    clear(folder / file)
    return f"no {file}"


def template(rng: random.Random, folder: Path) -> str:
    """A chat template in one of the places where loaders look."""
    text = rng.choice(TEMPLATES)
    place = rng.choice(["jinja", "json", "config", "named"])
    clear(folder / "chat_template.jinja")
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    elif place == "json":
        write(folder / "chat_template.json", {"chat_template": text})
    else:
        settings = read(folder / "tokenizer_config.json")
        named = rng.choice([[{"name": "rag", "template": text}], [{"name": "default"}], [text], {}])
        settings = settings if isinstance(settings, dict) else {}
        settings["chat_template"] = text if place == "config" else named
        write(folder / "tokenizer_config.json", settings)
    return f"chat template ({place}): {brief(text)}"
