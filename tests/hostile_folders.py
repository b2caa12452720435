"""Model folders that are not what they claim, through `plan`, `bake --subspace` and `build`.

Each folder is a tiny model that loads, with one to three of its files damaged, replaced or added
to, at random from a seed. Counted as a failure is a folder that ends in a traceback or another
exit code than 0 and 1, runs for longer than a minute, takes more memory than 4 GB, leaves part of
an output folder behind, or has the content of a private file copied.

    python -m tests.hostile_folders --n 1000 --seed 0
    python -m tests.hostile_folders --seed 0 --only 17      # one folder again, with what it said
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAX_SECONDS = 60
MAX_BYTES = 4 << 30
BATCH = 50
COMMANDS = ("plan", "bake", "build")
FAMILIES = ("llama", "sharded", "llama_tied", "qwen3", "gemma", "phi3")
WEIGHTS = "model.safetensors"
SECRET = "the content of a private file"

RECIPE = """model: {model}
layers: [2]
k: 1
prompts:
  target: {{path: ../target.txt}}
  neutral: {{path: ../neutral.txt}}
rollouts: {{max_new_tokens: 2}}
"""
THINGS = ("river", "bridge", "wall", "square", "port", "tower", "gate", "market")

Mutation = Callable[[random.Random, Path], str]


# ---- values of every wrong type and size


def deep(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**4, 10**6, 10**9, 2**31, 2**63, 10**18, 10**40),
    *(-(10**9), 0.0, 0.5, -1.5, 1e308, math.inf, -math.inf, math.nan, 32.0),
    *("", "3", "a", "llama", "float32", "bfloat16", "auto", "\ud800", "\0", "a\nb", "\x1b[2J"),
    *("../../etc/passwd", "x" * 5000, "{{ 1/0 }}", "torch.float99"),
)
CONTAINERS: tuple[Any, ...] = (
    *([], {}, [None], [1, "a"], ["a", "b"], [0] * 3, [2.5], [[1]], [{}], {"a": 1}, {"": None}),
    *(["full_attention"] * 3, ["sliding_attention"], {"rope_type": "default"}, {"rope_type": 3}),
    *({"rope_type": "yarn", "factor": 0}, {"rope_type": "linear"}, {"rope_theta": "x"}),
    *({"quant_method": "fp8"}, {"quant_method": []}, {"model_type": "llama"}, deep(50)),
)
KEYS = (
    *("attention_bias", "mlp_bias", "attention_dropout", "head_dim", "hidden_act", "hidden_size"),
    *("hidden_activation", "initializer_range", "intermediate_size", "max_position_embeddings"),
    *("model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    *("rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings"),
    *("vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
    *("torch_dtype", "architectures", "auto_map", "quantization_config", "sliding_window"),
    *("layer_types", "max_window_layers", "partial_rotary_factor", "transformers_version"),
    *("is_encoder_decoder", "is_decoder", "output_attentions", "output_hidden_states"),
    *("return_dict", "attn_implementation", "_attn_implementation", "text_config", "num_experts"),
    *("num_local_experts", "n_routed_experts", "num_nextn_predict_layers", "id2label", "label2id"),
    *("num_labels", "problem_type", "chunk_size_feed_forward", "torchscript", "use_bfloat16"),
    *("cross_attention_hidden_size", "add_cross_attention", "tokenizer_class", "prefix"),
    *("generation_config", "pruned_heads", "base_model_tp_plan", "transformers_weights"),
    *("per_layer_config", "vision_config", "sub_configs", "attribute_map", "name_or_path"),
)
GENERATION_KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "min_length", "do_sample"),
    *("temperature", "top_p", "top_k", "num_beams", "num_return_sequences", "use_cache"),
    *("repetition_penalty", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *("cache_implementation", "cache_config", "watermarking_config", "compile_config"),
    *(
        "max_new_tokens",
        "stop_strings",
        "output_scores",
        "return_dict_in_generate",
        "penalty_alpha",
    ),
    *("assistant_early_exit", "prompt_lookup_num_tokens", "custom_generate", "max_time"),
)
TOKENIZER_KEYS = (
    *("tokenizer_class", "model_max_length", "bos_token", "eos_token", "pad_token", "unk_token"),
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "auto_map"),
    *("chat_template", "clean_up_tokenization_spaces", "add_bos_token", "add_eos_token", "legacy"),
    *("padding_side", "truncation_side", "model_input_names", "split_special_tokens", "backend"),
    *("use_fast", "is_local", "processor_class", "response_schema", "vocab_file", "merges_file"),
    *("tokenizer_file", "name_or_path", "special_tokens_map_file", "add_prefix_space"),
)
TOKENIZER_CLASSES = (
    *("LlamaTokenizer", "GPT2Tokenizer", "T5Tokenizer", "BertTokenizer", "Qwen2Tokenizer"),
    *("PreTrainedTokenizerFast", "NoSuchTokenizer", "CanineTokenizer", "ByT5Tokenizer"),
    *("MistralCommonTokenizer", "XLMRobertaTokenizer", "GemmaTokenizerFast", "TokenizersBackend"),
)
TEMPLATES = (
    *("", " ", "{{ 1/0 }}", "{{", "{% for %}", "{{ messages[99].content }}", "{{ x.y.z }}"),
    *("{{ raise_exception('no') }}", "{{ messages }}", "fixed", "{{ bos_token * 100 }}"),
    *("{{ messages[0]['content'] | tojson | upper }}", "{{ ''.__class__.__mro__ }}", "\0"),
    *("{{ 'a' * 10**10 }}", "{% include 'x' %}", "{{ strftime_now(3) }}", "{{ 10 ** 10 ** 8 }}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages | no_such_filter }}"),
    *("{% for a in range(10**9) %}{% endfor %}", "{{ ('x' ~ messages[0].content) * 3000 }}"),
    *("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "{{ [] | first }}", "{{ [] | random }}"),
    *("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "{{ none + 1 }}"),
    *("{%- for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", "é\u2028\ufeff"),
)


def hostile(rng: random.Random) -> Any:
    """A value of some type, rarely the one that is wanted."""
    return rng.choice(SCALARS) if rng.random() < 0.6 else rng.choice(CONTAINERS)


def brief(value: Any) -> str:
    """A value for a label: ASCII, at most 60 characters."""
    try:
        text = ascii(value)
    except RecursionError:
        text = f"a deep {type(value).__name__}"
    return text if len(text) <= 60 else text[:59] + "~"


# ---- one file of JSON


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


# ---- things that are no files


def _fifo(path: Path, place: Path) -> None:
    os.mkfifo(path)


def _device(path: Path, place: Path) -> None:
    path.symlink_to("/dev/zero")


def _tty(path: Path, place: Path) -> None:
    path.symlink_to("/dev/stdin")


def _outside(path: Path, place: Path) -> None:
    (place / "private.txt").write_text(SECRET)
    path.symlink_to(place / "private.txt")


def _outside_relative(path: Path, place: Path) -> None:
    (place / "private.txt").write_text(SECRET)
    path.symlink_to("../private.txt")


def _outside_folder(path: Path, place: Path) -> None:
    (place / "private").mkdir(exist_ok=True)
    (place / "private" / "a.jinja").write_text(SECRET)
    path.symlink_to(place / "private")


def _folder(path: Path, place: Path) -> None:
    path.mkdir()


def _dangling(path: Path, place: Path) -> None:
    path.symlink_to("nothing-there")


def _itself(path: Path, place: Path) -> None:
    path.symlink_to(path.name)


def _kernel(path: Path, place: Path) -> None:
    path.symlink_to("/proc/self/mem")


def _sparse(path: Path, place: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)


def _blobs(path: Path, place: Path) -> None:
    """As in the Hub's cache, but of another layout."""
    (place / "blobs").mkdir(exist_ok=True)
    (place / "blobs" / ("a" * 64)).write_text(SECRET)
    path.symlink_to(Path("../blobs") / ("a" * 64))


NODES = (
    *(_fifo, _device, _tty, _outside, _outside_relative, _outside_folder, _folder, _dangling),
    *(_itself, _kernel, _sparse, _blobs),
)
ODD_NAMES = (
    *("LICENSE\x1b[2J", "LICENSE\nx", "tokenizer_\ud800.json", "terms\u2028.txt", "a\\b.jinja"),
    *(
        "terms_of_use.txt",
        "NOTICE",
        "LICENSE-" + "x" * 240,
        "chat_template_x.json",
        ".hidden.jinja",
    ),
)


def node_in_place_of_a_file(rng: random.Random, folder: Path) -> str:
    """A pipe, a device, a link or a folder, where a loader or a copy expects a file."""
    there = sorted(path.name for path in folder.iterdir())
    file = rng.choice([*there, *SMALL_FILES, *ODD_NAMES])
    path = (
        folder / os.fsdecode(file.encode("utf-8", "surrogateescape"))
        if "\ud800" not in file
        else (folder / "tokenizer_\udcff.json")
    )
    make = rng.choice(NODES)
    clear(path)
    path.parent.mkdir(exist_ok=True)
    make(path, folder.parent)
    return f"{brief(file)}: {make.__name__[1:]}"


# ---- cards


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


# ---- weights

TENSOR_FAULTS = (
    *("inf", "nan", "one-inf", "zeros", "flat", "swapped", "dtype", "renamed", "long-header"),
    *("cut", "metadata", "moved", "gone"),
)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes after it."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: dict[str, Any], body: bytes) -> bytes:
    """A safetensors file."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def weights(rng: random.Random, folder: Path) -> str:
    """A tensor of a weight file gets other numbers, another shape, dtype or name."""
    files = sorted(
        p for p in folder.glob("*.safetensors") if p.is_file() and p.stat().st_size < 1 << 24
    )
    if not files:
        return without_a_file(rng, folder)
    path = rng.choice(files)
    header, body = header_of(path.read_bytes())
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    entry, data = header[name], bytearray(body)
    start, stop = entry["data_offsets"]
    kind = rng.choice(TENSOR_FAULTS)
    half = {"inf": b"\x80\x7f", "nan": b"\xc0\x7f", "zeros": b"\0\0"}
    if kind in half:
        data[start:stop] = half[kind] * ((stop - start) // 2)
    elif kind == "one-inf":
        data[start : start + 2] = b"\x80\x7f"
    elif kind == "flat":
        entry["shape"] = [math.prod(entry["shape"])]
    elif kind == "swapped":
        entry["shape"] = entry["shape"][::-1]
    elif kind == "dtype":
        entry["dtype"] = rng.choice(["F16", "I16", "U16", "F32", "X9", "F8_E4M3"])
    elif kind == "renamed":
        new = rng.choice(["lm_head.weight", "x", "", "\x1b[2J", "model.layers.99.a", "a" * 3000])
        header[new] = header.pop(name)
    elif kind == "metadata":
        header["__metadata__"] = rng.choice([{"format": "tf"}, {}, {"format": "\x1b"}, {"a": 1}, 3])
    elif kind == "moved":
        entry["data_offsets"] = [start + rng.choice([-1, 2, 2**40]), stop]
    elif kind == "gone":
        del header[name]
    if kind == "long-header":
        path.write_bytes(rng.choice([0, 2**20, 10**8, 2**63]).to_bytes(8, "little") + bytes(data))
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: rng.randrange(len(data))])
    else:
        path.write_bytes(with_header(header, bytes(data)))
    return f"{path.name}: {kind} {brief(name)}"


def index(rng: random.Random, folder: Path) -> str:
    """An index of shards that says something else; of a single file it is made first."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        single = folder / WEIGHTS
        if not single.is_file() or single.stat().st_size > 1 << 24:
            return without_a_file(rng, folder)
        header, _ = header_of(single.read_bytes())
        clear(folder / "model-00001-of-00001.safetensors")
        single.rename(folder / "model-00001-of-00001.safetensors")
        names = header.keys() - {"__metadata__"}
        write(
            path,
            {
                "metadata": {},
                "weight_map": dict.fromkeys(sorted(names), "model-00001-of-00001.safetensors"),
            },
        )
    values = read(path)
    if not isinstance(values, dict) or not isinstance(values.get("weight_map"), dict):
        return field_of(path.name, ("weight_map", "metadata"))(rng, folder)
    files = sorted(map(str, values["weight_map"].values())) or ["x.safetensors"]
    kind = rng.choice(["tied head", "extra", "gone", "elsewhere", "type", "metadata"])
    if kind == "tied head":
        values["weight_map"]["lm_head.weight"] = rng.choice(files)
    elif kind == "extra":
        values["weight_map"]["model.layers.1.x.weight"] = rng.choice(files)
    elif kind == "gone":
        values["weight_map"].pop(rng.choice(sorted(values["weight_map"])), None)
    elif kind == "elsewhere":
        new = rng.choice(["../private.txt", "/etc/passwd", "", "x.bin", "sub/x.safetensors", 3])
        values["weight_map"][rng.choice(sorted(values["weight_map"]))] = new
    elif kind == "type":
        values["weight_map"] = hostile(rng)
    else:
        values["metadata"] = hostile(rng)
    write(path, values)
    return f"index: {kind}"


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


# ---- running


@dataclass(frozen=True)
class Outcome:
    """How one command took one folder; `fault` is empty where it behaved.

    Attributes:
        number: of the folder.
        what: what is wrong with it.
        command: one of `COMMANDS`.
        code: exit code.
        fault: kind of misbehaviour, if any.
        said: the last line of the error.
        seconds: wall time.
        peak: bytes of resident memory at most.
    """

    number: int
    what: str
    command: str
    code: int
    fault: str
    said: str
    seconds: float
    peak: int


def make_sound(place: Path) -> dict[str, Path]:
    """The models that load, by family, with what every folder's build needs beside them."""
    import torch
    from safetensors.torch import save_file

    from tests.helpers.tiny import D_MODEL, save_tiny, train_tokenizer

    tokenizer = train_tokenizer()
    found = {}
    for family in FAMILIES:
        kind, size = ("llama", "30KB") if family == "sharded" else (family, "1GB")
        found[family] = save_tiny(
            kind, place / family, tokenizer, dtype=torch.bfloat16, shard_size=size
        )
    (place / "target.txt").write_text("\n".join(f"Where is the old {x}?" for x in THINGS))
    (place / "neutral.txt").write_text("\n".join(f"What is a {x}?" for x in THINGS))
    torch.manual_seed(0)
    save_file({"subspace": torch.randn(D_MODEL, 1)}, place / "q.safetensors")
    return found


def arguments(command: str, place: Path) -> list[str]:
    """The command line, in the folder `place` that holds `model`."""
    if command == "plan":
        return ["plan", str(place / "model"), "--out", str(place / "out")]
    if command == "bake":
        own = ["--model", str(place / "model"), "--subspace", str(place.parent / "q.safetensors")]
        return ["bake", *own, "--out", str(place / "out")]
    return ["build", str(place / "r.yaml"), "--out", str(place / "out"), "--device", "cpu"]


_ERROR = re.compile(r"(\w+): \S")


def judge(command: str, code: int, error: BaseException | None, stderr: str, out: Path) -> str:
    """The kind of misbehaviour, or nothing."""
    import abliterator.errors

    if error is not None and not isinstance(error, SystemExit):
        return f"traceback: {type(error).__module__}.{type(error).__name__}"
    if code not in (0, 1) or "Traceback" in stderr:
        return f"exit code {code}"
    if code == 1:
        last = stderr.rstrip("\n").rsplit("\n", 1)[-1]
        match = _ERROR.match(last)
        if match is None or not hasattr(abliterator.errors, match[1]):
            return "no named error on the last line"
        if not last.isprintable():
            return "an error that is not printable"
        if out.exists():
            return "partial output"
    elif command != "plan":
        checkpoint = out if command == "bake" else out / "checkpoint"
        whole = "abliterator/edits.json" if command == "bake" else "abliterator/record.json"
        if not (checkpoint / whole).is_file():
            return "partial output"
        if any(SECRET.encode() in p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()):
            return "a private file was copied"
    return ""


def run_command(command: str, number: int, what: str, place: Path) -> Outcome:
    """Runs one command in this process."""
    import traceback

    from click.testing import CliRunner

    from abliterator.cli import main

    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    start, out = time.monotonic(), place / "out"
    done = CliRunner().invoke(main, arguments(command, place))
    seconds = time.monotonic() - start
    fault = judge(command, done.exit_code, done.exception, done.stderr, out)
    said = done.stderr.rstrip("\n").rsplit("\n", 1)[-1]
    if fault.startswith("traceback") and done.exc_info is not None:
        lines = traceback.format_exception(*done.exc_info)
        said = "".join(lines)[-2500:]
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    if not fault and peak > MAX_BYTES:
        fault = "memory"
    shutil.rmtree(out, ignore_errors=True)
    return Outcome(number, what, command, done.exit_code, fault, said, round(seconds, 2), peak)


def run_batch(seed: int, numbers: list[int], place: Path, log: Path) -> None:
    """The child: folders one after another; before and after each command, a line in `log`."""
    importlib.import_module("transformers.models.llama.modeling_llama")
    gc.collect()
    gc.freeze()  # a build collects garbage several times, and passes over what was imported
    sound = {family: place / family for family in FAMILIES}
    os.chdir(place)
    with log.open("a", encoding="utf-8") as lines:
        for number in numbers:
            own = place / f"folder{number}"
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir()
            _, what = make_folder(seed, number, sound, own)
            (own / "r.yaml").write_text(RECIPE.format(model=json.dumps(str(own / "model"))))
            for command in COMMANDS:
                print(json.dumps([number, what, command]), file=lines, flush=True)
                print(
                    json.dumps(asdict(run_command(command, number, what, own))),
                    file=lines,
                    flush=True,
                )
            shutil.rmtree(own, ignore_errors=True)


def child(seed: int, numbers: list[int], place: Path) -> list[Outcome]:
    """Runs folders in a process of their own; the last line names whoever ends or hangs it."""
    log = place / "log.jsonl"
    log.unlink(missing_ok=True)
    log.touch()
    job = [str(seed), ",".join(map(str, numbers)), str(place), str(log)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": "1", "ABLITERATOR_CACHE": str(place / "cache")}
    environment |= {"HF_MODULES_CACHE": str(place / "modules"), "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.hostile_folders", "--job", *job],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as process:
        ended = _watch(process, log)
        said = (process.stderr.read() if process.stderr else b"").decode("utf-8", "replace")[-500:]
    lines = [json.loads(line) for line in log.read_text("utf-8").split("\n") if line]
    found = [Outcome(**line) for line in lines if isinstance(line, dict)]
    if lines and isinstance(lines[-1], list):
        number, what, command = lines[-1]
        found.append(Outcome(number, what, command, -1, ended or "the process died", said, 0, 0))
    elif process.returncode != 0 and not ended:
        raise RuntimeError(f"the batch itself failed: {said}")
    return found


def _watch(process: subprocess.Popen[bytes], log: Path) -> str:
    """Waits for the process; ends it, and says why, when a command takes too long or too much."""
    size, since = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.05)
        if (now := log.stat().st_size) != size:
            size, since = now, time.monotonic()
        allowed = MAX_SECONDS + (120 if size == 0 else 0)  # torch is imported before the first
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            pages = 0
        too_much = pages * os.sysconf("SC_PAGE_SIZE") > MAX_BYTES
        if too_much or time.monotonic() - since > allowed:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "memory" if too_much else "hang"
    return ""


def run_all(
    seed: int, numbers: list[int], place: Path, tell: Callable[[Outcome], None]
) -> list[Outcome]:
    """All folders, in batches; a batch that was ended goes on after the folder that ended it."""
    found: list[Outcome] = []
    rest = list(numbers)
    while rest:
        batch, rest = rest[:BATCH], rest[BATCH:]
        outcomes = child(seed, batch, place)
        if not outcomes:
            raise RuntimeError(f"The child for folders {batch[0]} to {batch[-1]} did not start.")
        for outcome in outcomes:
            tell(outcome)
        found += outcomes
        reached = max(outcome.number for outcome in outcomes)
        rest = [number for number in batch if number > reached] + rest
    return found


def main() -> int:
    """The script; the exit code is 0 where every folder was handled as promised."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=1000, help="folders")
    parser.add_argument("--start", type=int, default=0, help="number of the first folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this folder alone, with all that is said")
    parser.add_argument("--keep", type=Path, help="append outcomes to this file, a JSON line each")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        seed, numbers, place, log = asked.job
        run_batch(int(seed), [int(n) for n in numbers.split(",")], Path(place), Path(log))
        return 0
    numbers = list(range(asked.start, asked.start + asked.n))
    if asked.only is not None:
        numbers = [asked.only]

    def tell(outcome: Outcome) -> None:
        if asked.keep:
            with asked.keep.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(outcome)) + "\n")
        if outcome.fault or asked.only is not None:
            print(
                f"{outcome.number} {outcome.command}: {outcome.fault or outcome.code}", flush=True
            )
            print(f"   {outcome.what}\n   {outcome.said}", flush=True)

    with tempfile.TemporaryDirectory(prefix="hostile-folders-") as scratch:
        place = Path(scratch)
        make_sound(place)
        found = run_all(asked.seed, numbers, place, tell)
    faults = Counter(outcome.fault.partition(":")[0] for outcome in found if outcome.fault)
    codes = Counter((outcome.command, outcome.code) for outcome in found)
    print(f"seed {asked.seed}, {len({o.number for o in found})} folders, {len(found)} commands")
    print("; ".join(f"{c} exits {code}: {n}" for (c, code), n in sorted(codes.items())))
    print(f"longest {max(o.seconds for o in found):.1f} s; ", end="")
    print(f"most memory {max(o.peak for o in found) / 1e9:.2f} GB")
    print("faults: " + ("; ".join(f"{k} {n}" for k, n in faults.most_common()) or "none"))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
