"""Greedy decoding, or sampling with a seed, the same for base and edited.

A model's generation_config for sampling, penalties or lengths does not apply: two models are
compared, so only the weights may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from abliterator.anatomy import anatomy_of
from abliterator.checkpoint import Checkpoint
from abliterator.costs import DEFAULT_ROWS, ModelShape, rows_that_fit, shape_of
from abliterator.devices import CPU, device_memory
from abliterator.engines._protocol import Answer
from abliterator.engines._sampling import Sampling
from abliterator.engines._work import Work, in_order
from abliterator.errors import GenerationError, UnsupportedModel
from abliterator.model import (
    ByRow,
    LoadedModel,
    Prefix,
    cache_name,
    limits_of,
    masked_positions,
    padding_is_neutral,
    require_fit,
    require_numbers,
    run_prefix,
)
from abliterator.thinking import Splitter

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
    from transformers.generation.streamers import BaseStreamer

# tokens of an answer on which padding is tested: one from the prompt, then from its cache
PROBED = 3


def stop_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """The tokens that end an answer: those of generation_config, config and tokenizer together.

    Take them from the base and give them to both sides.
    """
    model = loaded.model
    return declared_stop_ids(model.generation_config, model.config, loaded.tokenizer)


def declared_stop_ids(
    generation_config: GenerationConfig | None,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, ...]:
    """The tokens that end an answer, as the three declare them."""
    ids: set[int] = set()
    # in a multimodal model, the language model has a separate config
    parts = (generation_config, config, config.get_text_config(), tokenizer)
    for declared in (getattr(part, "eos_token_id", None) for part in parts):
        ids.update(
            declared if isinstance(declared, list) else [] if declared is None else [declared]
        )
    return tuple(sorted(ids))


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    answered: MutableMapping[int, Answer] | None = None,
    on_batch: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Answer]:
    """Answers, one a prompt, as `Engine.answers` gives them; a batch too large is halved."""
    with answer_work(loaded, prompts, skipped=answered or (), **options) as work:
        return in_order(work.results(), on_batch, answered)


@contextmanager
def answer_work(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    stop_ids: Sequence[int],
    share_prefix: bool = False,
    by_row: ByRow | None = None,
    sampling: Sampling | None = None,
    skipped: Collection[int] = (),
) -> Iterator[Work[list[Answer]]]:
    """Batches of answers: the likeliest token at every step, or a drawn one, up to a stop.

    Prompts of similar length share a left-padded batch, those of one length where padding would
    change what this model answers.

    Arguments and errors are those of `Engine.answers`; `by_row` has the edit of each
    prompt, where they run under several, and `skipped` the prompts that are answered already.
    """
    require_tokens(prompts)
    require_fit(limits_of(loaded), prompts, max_new_tokens=max_new_tokens)
    if share_prefix and prompts:
        with torch.inference_mode():
            prefix = run_prefix(loaded, prompts, by_row)
    else:
        prefix = Prefix(by_row=by_row)
    splitter = Splitter(loaded.tokenizer)

    def run_part(batch: list[int], whole: list[int]) -> list[Answer]:
        width = max(len(prompts[i]) for i in whole)
        rows = _continuations(loaded, prompts, batch, width, prefix=prefix, sampling=sampling)
        return [
            answer_of(splitter, prompts[i], row, stop_ids)
            for i, row in zip(batch, rows, strict=True)
        ]

    with _with_config(loaded.model, _greedy(loaded, max_new_tokens, stop_ids)):
        plan = partial(_batches, loaded, prompts, batch_size, prefix)
        work = Work(
            plan, lambda batch: run_part(batch, batch), run_part, run_batches=loaded.run_batches
        )
        yield work.without(skipped)


def require_tokens(prompts: Sequence[Sequence[int]]) -> None:
    """Raises GenerationError for an empty prompt."""
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise GenerationError(
                f"Prompt {index} has no tokens. Remove it, or check the chat template."
            )


def stream(
    loaded: LoadedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    on_text: Callable[[str], None],
    on_end: Callable[[Answer], None] = lambda answer: None,
) -> None:
    """Generates the answer of `generate` to one prompt, and passes it on piece by piece.

    Args:
        loaded: the model.
        prompt: token ids of a rendered prompt.
        max_new_tokens: at most this many.
        stop_ids: tokens that end the answer; they are not passed on.
        on_text: called with each piece; together they are the text without special tokens.
        on_end: called with the answer so far, also when Ctrl-C stopped it.
    """
    from transformers import TextStreamer

    tokens: list[int] = []

    class Streamer(TextStreamer):  # type: ignore[misc]
        def put(self, value: torch.Tensor) -> None:
            if not self.next_tokens_are_prompt:
                tokens.append(int(value.item()))
            if self.next_tokens_are_prompt or value.item() not in stop_ids:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    streamer = Streamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        with _with_config(loaded.model, _greedy(loaded, max_new_tokens, stop_ids)):
            _continuations(loaded, [prompt], [0], len(prompt), prefix=Prefix(), streamer=streamer)
    finally:
        on_end(answer_of(Splitter(loaded.tokenizer), prompt, tokens, stop_ids))


def _greedy(loaded: LoadedModel, max_new_tokens: int, stop_ids: Sequence[int]) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=_pad_id(loaded, stop_ids),
    )


def _pad_id(loaded: LoadedModel, stop_ids: Sequence[int]) -> int:
    """A token for padding; any does, since it is masked in prompts and cut off in answers."""
    pad: int | None = loaded.tokenizer.pad_token_id
    return pad if pad is not None else next(iter(stop_ids), 0)


@contextmanager
def _with_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replaces the model's generation config within a block.

    Passing it to `generate` is not enough: transformers fills what it leaves unset (a repetition
    penalty, suppressed tokens) from the model's generation_config.
    """
    original = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = original


def _batches(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], batch_size: int | None, prefix: Prefix
) -> list[list[int]]:
    """Indices of prompts that run together, of one length each where padding changes answers.

    Longest first, so that the batch that needs most memory is the first to be halved if any must.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    if not order:
        return []
    width = len(prompts[order[0]]) + loaded.model.generation_config.max_new_tokens
    batch_size = batch_size or _rows_that_fit(loaded, width)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if all(len(prompts[batch[0]]) == len(prompts[batch[-1]]) for batch in batches):
        return batches
    neutral = padding_is_neutral(
        loaded,
        lambda pads: _answer_logits(loaded, prompts, order[-1], prefix, pads),
        len(prompts[order[-1]]) + PROBED,
        shared=prefix.cache is not None,
        width=width,
    )
    if neutral:
        return batches
    lengths = [list(group) for _, group in groupby(order, key=lambda i: len(prompts[i]))]
    return [
        group[i : i + batch_size] for group in lengths for i in range(0, len(group), batch_size)
    ]


def _rows_that_fit(loaded: LoadedModel, tokens: int) -> int:
    """Sequences of so many tokens that are answered together where nobody says how many."""
    devices = {loaded.device, *(set(loaded.placement.values()) - {CPU, "disk"})}
    try:
        return rows_that_fit(
            partial(_shape, loaded.folder),
            tokens=tokens,
            device=loaded.device,
            memory=sum(device_memory(device).total for device in devices),
            number_bytes=loaded.model.dtype.itemsize,
        )
    except UnsupportedModel:  # a model that is compared, not edited: its cache may be of any size
        return DEFAULT_ROWS


def _shape(folder: Path) -> ModelShape:
    checkpoint = Checkpoint.open(folder)
    return shape_of(checkpoint, anatomy_of(checkpoint.config))


def _answer_logits(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    index: int,
    prefix: Prefix,
    pads: int,
) -> torch.Tensor:
    """[tokens, V] logits of the first tokens that answer one prompt, with so many pads."""
    width = len(prompts[index]) + pads
    inputs = _inputs(loaded, prompts, [index], prefix, width)
    with torch.inference_mode():
        output = loaded.model.generate(
            **inputs,
            max_new_tokens=min(PROBED, loaded.model.generation_config.max_new_tokens),
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.cat(output.logits)


def _continuations(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    batch: list[int],
    width: int,
    *,
    prefix: Prefix,
    streamer: BaseStreamer | None = None,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """New tokens of each prompt in `batch`, padded to `width`, and padding after the stop token."""

    def checked(_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return require_numbers(logits, loaded)

    processors: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [checked]
    if sampling is not None:
        processors.append(sampling.drawing([prompts[i] for i in batch], width))
    with torch.inference_mode():
        output = loaded.model.generate(
            **_inputs(loaded, prompts, batch, prefix, width),
            logits_processor=processors,
            streamer=streamer,
        )
    continuations: list[list[int]] = output[:, width:].tolist()
    return continuations


def _inputs(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    batch: Sequence[int],
    prefix: Prefix,
    width: int,
) -> dict[str, Any]:
    """Ids and mask [rows, width] of the prompts in `batch`, and the cache that they continue."""
    rows = [list(prompts[i]) for i in batch]
    pad = loaded.model.generation_config.pad_token_id
    start = prefix.length  # padding goes between what is shared and the rest
    ids = [r[:start] + [pad] * (width - len(r)) + r[start:] for r in rows]
    mask = [[1] * start + [0] * (width - len(r)) + [1] * (len(r) - start) for r in rows]
    with torch.inference_mode():
        cache = prefix.enter(batch)
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor(ids, device=loaded.device),
        "attention_mask": torch.tensor(mask, device=loaded.device),
    }
    if cache is not None:
        inputs |= {cache_name(loaded.model): cache}
        inputs |= masked_positions(loaded.model, inputs["attention_mask"])
    return inputs


def answer_of(
    splitter: Splitter,
    prompt: Sequence[int],
    row: Sequence[int],
    stop_ids: Sequence[int],
    *,
    is_ended: bool = False,
) -> Answer:
    """The answer in generated tokens; `is_ended` if it is whole though no stop token is in them."""
    end = next((i for i, token in enumerate(row) if token in stop_ids), None)
    token_ids = tuple(row[:end])
    is_cut = end is None and not is_ended
    split = splitter.split(prompt, token_ids, is_cut=is_cut)
    return Answer(
        text=split.thinking + split.answer,
        token_ids=token_ids,
        finish_reason="length" if is_cut else "stop",
        start=len(split.thinking),
        # a blank reply may be the beginning of a thought, and is none
        start_token=splitter.first_token(token_ids, split) if split.thinking.strip() else 0,
    )
