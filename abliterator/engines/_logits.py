"""Next-token distributions along answers that are given, not generated."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from abliterator.engines._protocol import AnswerPath, OnBatch, Tokens
from abliterator.engines._work import Work, by_prompt, in_order
from abliterator.errors import GenerationError
from abliterator.model import (
    ByRow,
    LoadedModel,
    Prefix,
    cache_is_continued,
    cache_name,
    equal_length_batches,
    is_plain,
    limits_of,
    positions_from,
    require_fit,
    require_numbers,
    run_prefix,
)

# Logits of one batch: with their float32 and float64 copies, a few times this is in memory.
BATCH_BYTES = 32 << 20


def logits_along(
    loaded: LoadedModel,
    paths: Sequence[AnswerPath],
    *,
    on_batch: OnBatch | None = None,
    **options: Any,
) -> Iterator[tuple[int, Tensor]]:
    """Logits at the last positions of every path, as `Engine.logits` gives them."""
    yield from by_prompt(logits_work(loaded, paths, **options).results(), on_batch)


def logits_work(
    loaded: LoadedModel,
    paths: Sequence[AnswerPath],
    *,
    max_batch_tokens: int,
    share_prefix: bool = False,
    by_row: ByRow | None = None,
) -> Work[list[Tensor]]:
    """Batches that give the logits at the last positions of every path, as `Engine.logits` does.

    Paths run in batches of one length, unpadded; of each, only the compared positions' logits are
    made (where the model's code can do that), and batches are cut so that their logits stay small.
    What all paths begin with, if it is shared, runs once for each edit (`by_row` has that of each
    path) and does not count in `max_batch_tokens`.

    Raises:
        GenerationError: if there is no path, or one is empty, or logits are NaN or infinite.
        PromptError: for a path that is longer than what the model reads.
    """
    token_ids = [path.token_ids for path in paths]
    if not token_ids or not all(map(len, token_ids)):
        raise GenerationError(
            "There are no prompts to compare, or one of them has no tokens. Give ordinary prompts."
        )
    require_fit(limits_of(loaded), token_ids)
    prefix = Prefix(by_row=by_row)
    if share_prefix:
        prefix = _run_prefix(loaded, [path.prompt for path in paths], by_row)
    rests = [ids[prefix.length :] for ids in token_ids]

    def run(batch: list[int]) -> list[Tensor]:
        ids = torch.tensor([list(rests[i]) for i in batch], device=loaded.device)
        keep = max(paths[i].positions for i in batch)
        cache = prefix.enter(batch)
        logits, _ = _last_logits(
            loaded, ids, keep=keep, cache=cache, start=prefix.length, use_cache=cache is not None
        )
        return [logits[row, -paths[i].positions :].cpu() for row, i in enumerate(batch)]

    plan = partial(_batches, loaded, paths, rests, max_batch_tokens)
    return Work(plan, run, run_batches=loaded.run_batches)


def log_likelihoods(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Tokens],
    **options: Any,
) -> Tensor:
    """[N, C] float64 log-probabilities of each of C continuations after each prompt, nats."""
    work = likelihood_work(loaded, prompts, continuations, **options)
    return torch.stack(in_order(work.results()))


def likelihood_work(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Tokens],
    *,
    max_batch_tokens: int,
    together: bool = False,
    by_row: ByRow | None = None,
) -> Work[list[Tensor]]:
    """Batches that give [C] float64 log-probabilities a prompt, as `Engine.log_likelihoods` does.

    The tokens that all prompts begin with run once for each edit, and every prompt once: its
    continuations continue a copy of its cache, where the model can.

    Args:
        loaded: the model, hooks and all.
        prompts: token ids, one rendered prompt each.
        continuations: token ids, none empty.
        max_batch_tokens: tokens in a batch.
        together: continuations of a prompt as rows of one batch, where the model can.
        by_row: the edit of each prompt, where they run under several.
    """
    prefix = _run_prefix(loaded, prompts, by_row)
    rests = [prompt[prefix.length :] for prompt in prompts]
    return Work(
        partial(equal_length_batches, rests, max_batch_tokens),
        partial(_log_likelihoods, loaded, rests, continuations, prefix, together),
        run_batches=loaded.run_batches,
    )


def _log_likelihoods(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Tokens],
    prefix: Prefix,
    together: bool,
    batch: list[int],
) -> list[Tensor]:
    """[C] float64 log-probabilities of each prompt in `batch`, whose prompts have one length."""
    ids = torch.tensor([list(prompts[i]) for i in batch], device=loaded.device)
    start = prefix.length
    first, cache = _last_logprobs(loaded, ids, keep=1, cache=prefix.enter(batch), start=start)

    def from_cache(inputs: Tensor) -> Tensor:
        cache_copy, position = copy.deepcopy(cache), start + ids.shape[1]
        n = inputs.shape[1]
        return _last_logprobs(loaded, inputs, keep=n, cache=cache_copy, start=position)[0]

    def from_start(inputs: Tensor) -> Tensor:
        rows, prefix_cache = torch.cat([ids, inputs], dim=1), prefix.enter(batch)
        n = inputs.shape[1]
        return _last_logprobs(loaded, rows, keep=n, cache=prefix_cache, start=start)[0]

    @lru_cache(maxsize=1)  # labels of one question mostly differ in their last token alone
    def after(tokens: Tokens) -> Tensor:
        inputs = torch.tensor([tokens] * len(batch), device=loaded.device)
        can_continue = cache is not None and cache_is_continued(
            loaded, partial(_both, from_start, from_cache, inputs)
        )
        return from_cache(inputs) if can_continue else from_start(inputs)

    rows: dict[Tokens, Tensor] = {}
    if together and is_plain(cache):
        shared = Prefix(start + ids.shape[1], cache)
        rows = _side_by_side(loaded, continuations, shared, len(batch), from_start)
    columns = []
    for tokens in continuations:
        column = first[:, -1, tokens[0]].double()
        if len(tokens) > 1:
            begun = tuple(tokens[:-1])
            logprobs = rows[begun] if begun in rows else after(begun)
            steps, following = torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])
            column = column + logprobs[:, steps, following].double().sum(dim=1)
        columns.append(column)
    return list(torch.stack(columns, dim=1))


def _side_by_side(
    loaded: LoadedModel,
    continuations: Sequence[Tokens],
    prompts: Prefix,
    n: int,
    from_start: Callable[[Tensor], Tensor],
) -> dict[Tokens, Tensor]:
    """Log-probabilities [N, tokens, V] after each of what the continuations begin with.

    They are rows of one batch, padded after their end, which no earlier token sees. Empty where
    that gives other numbers than a pass from the start.

    Args:
        loaded: the model.
        continuations: token ids.
        prompts: the prompts' cache, a row each.
        n: prompts.
        from_start: log-probabilities after tokens that continue the prompts without their cache.
    """
    begun = list(dict.fromkeys(tuple(c[:-1]) for c in continuations if len(c) > 1))
    if not begun:
        return {}
    width = max(map(len, begun))
    size = n * width * loaded.model.config.get_text_config().vocab_size * 4
    at_once = max(1, 4 * BATCH_BYTES // max(1, size))
    after: dict[Tokens, Tensor] = {}
    for i in range(0, len(begun), at_once):
        part = begun[i : i + at_once]
        inputs = torch.tensor([[*ids, *[ids[-1]] * (width - len(ids))] for ids in part] * n)
        logprobs, _ = _last_logprobs(
            loaded,
            inputs.to(loaded.device),
            keep=width,
            cache=prompts.copied([row for row in range(n) for _ in part]),
            start=prompts.length,
        )
        logprobs = logprobs.view(n, len(part), *logprobs.shape[1:])
        after |= {ids: logprobs[:, j, : len(ids)] for j, ids in enumerate(part)}
    first = torch.tensor([begun[0]] * n, device=loaded.device)
    is_same = cache_is_continued(loaded, lambda: (from_start(first), after[begun[0]]))
    return after if is_same else {}


def _both(
    from_start: Callable[[Tensor], Tensor], from_cache: Callable[[Tensor], Tensor], tokens: Tensor
) -> tuple[Tensor, Tensor]:
    return from_start(tokens), from_cache(tokens)


def _run_prefix(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], by_row: ByRow | None
) -> Prefix:
    with torch.inference_mode():
        return run_prefix(loaded, prompts, by_row)


def _batches(
    loaded: LoadedModel,
    paths: Sequence[AnswerPath],
    rests: Sequence[Sequence[int]],
    max_batch_tokens: int,
) -> list[list[int]]:
    """Batches of one length, cut so that their logits stay small; the order stays the same."""
    vocabulary = loaded.model.config.get_text_config().vocab_size
    longest = max(path.positions for path in paths)
    rows = max(1, BATCH_BYTES // max(1, longest * vocabulary * loaded.model.dtype.itemsize))
    batches = equal_length_batches(rests, max_batch_tokens)
    return [batch[i : i + rows] for batch in batches for i in range(0, len(batch), rows)]


def _last_logits(
    loaded: LoadedModel,
    ids: Tensor,
    *,
    keep: int,
    cache: Any = None,
    start: int = 0,
    use_cache: bool = True,
) -> tuple[Tensor, Any]:
    """Logits [N, keep, V] at the last `keep` positions of `ids` [N, T], and the model's cache.

    Args:
        loaded: the model.
        ids: token ids, rows of one length.
        keep: positions.
        cache: what an earlier call returned, which these tokens continue; it is changed.
        start: tokens that are in the cache.
        use_cache: whether the model keeps what a later call can continue.

    Raises:
        GenerationError: for logits that are NaN or infinite.
    """
    # old remote code makes the logits of every position
    takes_keep = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters
    keep_argument = {"logits_to_keep": keep} if takes_keep else {}
    name = cache_name(loaded.model)
    with torch.inference_mode():
        output = loaded.model(
            input_ids=ids,
            use_cache=use_cache,
            **({} if cache is None else {name: cache}),
            **keep_argument,
            **positions_from(loaded.model, start, ids),
        )
        return require_numbers(output.logits[:, -keep:], loaded), getattr(output, name, None)


def _last_logprobs(
    loaded: LoadedModel, ids: Tensor, *, keep: int, cache: Any = None, start: int = 0
) -> tuple[Tensor, Any]:
    """`_last_logits` as log-probabilities, float32 on the CPU."""
    logits, cache = _last_logits(loaded, ids, keep=keep, cache=cache, start=start)
    return logits.float().log_softmax(dim=2).cpu(), cache
