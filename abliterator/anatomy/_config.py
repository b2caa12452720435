"""From a model's config.json and the table to its anatomy, or an error that gives the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from abliterator.anatomy._anatomy import Anatomy
from abliterator.anatomy._table import Family, Wrapper, table
from abliterator.errors import CheckpointError, UnsupportedModel
from abliterator.files import shown
from abliterator.formats import storage_of

# What config.json calls the number of routed experts, depending on who wrote the architecture.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

# More of a kind than any model has: names of so many are made, and more would never end.
MOST = 1 << 16
_COUNTED = re.compile("(layers?|labels|classes|experts|heads|blocks|groups|modules|stages|books)$")


def anatomy_of(config: Mapping[str, Any]) -> Anatomy:
    """The anatomy of the model that a parsed config.json describes.

    Raises:
        UnsupportedModel: for a model_type that is not in the table, and for quantised weights.
        CheckpointError: where config.json lacks a number that every model has.
    """
    require_countable(config)
    model_type = str(config.get("model_type"))
    wrapper = table().wrappers.get(model_type)
    text = config if wrapper is None else _text_config(config, model_type)
    family = _family_of(str(text.get("model_type")), wrapper="text_config" in config)
    _check_requirements(model_type, family, text)
    in_memory = (wrapper or Wrapper()).at_run_time
    quantised = config.get("quantization_config")
    if quantised and not isinstance(quantised, Mapping):
        raise CheckpointError(
            f"config.json says quantization_config: {_repr(quantised)}, expected an object. The "
            "file is damaged: download the model again."
        )
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return Anatomy(
        model_type=model_type,
        n_layers=_size(text, *family.n_layers),
        d_model=_size(text, *family.d_model),
        blocks=in_memory(family.blocks),
        tied_embeddings=bool(family.tied_by_default if tied is None else tied),
        n_experts=_n_experts(family, text),
        extra_blocks=max(_count(text, key) for key in table().predictors.counted_by),
        storage=storage_of(config),
        sublayers=tuple(tuple(map(in_memory, names)) for names in family.sublayers),
        _family=family,
        _wrapper=wrapper or Wrapper(),
    )


def _text_config(config: Mapping[str, Any], model_type: str) -> Mapping[str, Any]:
    """Settings of a wrapper's language model: `text_config`, or the top level of older files."""
    text_type = f"{model_type}_text"
    flat_type = model_type if model_type in table().families else text_type
    flat = {**config, "model_type": flat_type} if "num_hidden_layers" in config else None
    inner = config.get("text_config", flat)
    if not isinstance(inner, Mapping):
        raise CheckpointError(
            f"config.json of a {model_type} has no text_config, which describes its language "
            "model. The file is incomplete or damaged: download the model again."
        )
    text = {"model_type": text_type, **inner}
    family = table().families.get(str(text["model_type"]))
    return {**family.sizes_left_out, **text} if family else text


def require_countable(config: object) -> None:
    """Checks that no part of a parsed config.json counts more layers or the like than exist.

    Loaders allocate a list of that length first, which a damaged number would never end.

    Raises:
        CheckpointError: naming the key.
    """
    parts: list[object] = [config]
    while parts:
        part = parts.pop()
        parts += part.values() if isinstance(part, Mapping) else []
        parts += part if isinstance(part, list) else []
        for key, value in part.items() if isinstance(part, Mapping) else ():
            if isinstance(value, (int, float)) and value > MOST and _COUNTED.search(str(key)):
                raise CheckpointError(
                    f"config.json says {shown(key)}: {_repr(value)}, expected a whole number up to "
                    f"{MOST}. The file is incomplete or damaged: download the model again."
                )


def known_model_types() -> tuple[str, ...]:
    """Every model_type from whose stream an edit keeps a subspace out, sorted."""
    return tuple(sorted({*table().families, *table().wrappers} - {*table().partial}))


def partial_model_types() -> Mapping[str, str]:
    """Every model_type of which only the writers can be edited, with the reason."""
    return table().partial


def partial_reason(config: Mapping[str, Any]) -> str | None:
    """Why the stream of a model keeps a removed subspace, from a parsed config.json of any type."""
    text = config.get("text_config")
    names = [part.get("model_type") for part in (config, text) if isinstance(part, Mapping)]
    return next((why for name in names if (why := table().partial.get(str(name)))), None)


def refused_model_types() -> Mapping[str, str]:
    """Every model_type that is deliberately not supported, with the reason."""
    return table().refused


def _family_of(model_type: str, *, wrapper: bool) -> Family:
    families, refused = table().families, table().refused
    if model_type in families:
        return families[model_type]
    if model_type in refused:
        raise UnsupportedModel(
            f"Models of type {shown(model_type)!r} are not supported: {refused[model_type]} Use a "
            "model of another type."
        )
    hint = " (config.json has a text_config: a wrapper of several models)" if wrapper else ""
    supported = known_model_types()
    alike = ", ".join(get_close_matches(model_type, supported)) or "llama, qwen3, gemma3"
    raise UnsupportedModel(
        f"No architecture of type {shown(model_type)!r}{hint} is known, so its writers (what is "
        f"added to the residual stream) are not either. {len(supported)} types are known, "
        f"among them {alike}; others need an entry in abliterator/anatomy/architectures.yaml."
    )


def _check_requirements(model_type: str, family: Family, config: Mapping[str, Any]) -> None:
    """Stops at a variant of a known type whose stream is built otherwise."""
    for key, value in family.requires.items():
        if config.get(key, value) != value:
            raise UnsupportedModel(
                f"config.json says {key}: {_repr(config[key])}; of the type {shown(model_type)!r}, "
                f"only models with {key}: {value!r} are supported, because others build the "
                "residual stream otherwise. Use another model."
            )


def _n_experts(family: Family, config: Mapping[str, Any]) -> int:
    if not any(part.per_expert or part.fused for part in family.writers):
        return 0
    return next((_count(config, key) for key in EXPERT_COUNTS if config.get(key)), 0)


def _count(config: Mapping[str, Any], key: str) -> int:
    """A number of experts or of further blocks; 0 where config.json does not say."""
    value = config.get(key) or 0
    if type(value) is not int or not 0 <= value <= MOST:
        raise CheckpointError(
            f"config.json says {key}: {_repr(value)}, expected a whole number from 0 to {MOST}. "
            "The file is incomplete or damaged: download the model again."
        )
    return value


def _size(config: Mapping[str, Any], *keys: str) -> int:
    key = next((key for key in keys if key in config), keys[0])
    value = config.get(key)
    if isinstance(value, list):  # one entry a block
        value = len(value)
    if type(value) is not int or value < 1:  # JSON's true would pass as an int
        raise CheckpointError(
            f"config.json says {key}: {_repr(value)}, expected a positive whole number. The file "
            f"is incomplete or damaged: download the model again."
        )
    return value


def _repr(value: object) -> str:
    """The repr of a config.json value for a message, escaped and shortened."""
    return shown(repr(value))
