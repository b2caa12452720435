"""Running a loaded model: forward hooks, and batches that fit in memory."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import BoundArguments
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor, nn

from abliterator.devices import CPU, is_out_of_memory, release_memory
from abliterator.errors import GenerationError, UnsupportedModel

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from abliterator.anatomy import Anatomy


@dataclass(frozen=True)
class CallHook:
    """A hook that also gets the arguments of its module's call."""

    run: Callable[[Tensor, BoundArguments], Tensor]


Hook = Callable[[Tensor], Tensor | None]
T = TypeVar("T")


class BatchInPass(Protocol):
    """One batch of several whose forward passes advance together, block by block."""

    def turn(self, key: str) -> AbstractContextManager[None]:
        """Waits until no other batch is in a turn with this key, and keeps others out."""


# The batch whose forward pass runs, where several advance together.
BATCH: ContextVar[BatchInPass | None] = ContextVar("batch", default=None)


class RunBatches(Protocol):
    """What `run_batches` does, in its way or in another."""

    def __call__(
        self, batches: Iterable[list[int]], run: Callable[[list[int]], T]
    ) -> Iterator[tuple[list[int], T]]:
        """Yields (batch, run(batch)); a batch that does not fit in memory is halved."""


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Hook | CallHook]) -> Iterator[None]:
    """Registers a forward hook on each module path, and removes all of them on exit.

    A hook gets the hidden states that the module returned (the first element of a tuple) and
    returns their replacement, or None to leave them. It must not change them in place: the same
    tensor may be the residual stream of another module. Where several batches advance together, a
    hook that the forward pass of one of them registers runs in that pass alone.

    Raises:
        UnsupportedModel: for a path that the model does not have.
    """
    handles: list[RemovableHandle] = []
    try:
        for path, hook in hooks.items():
            module = _submodule(model, path)
            handles.append(module.register_forward_hook(_adapted(hook), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_paths(anatomy_blocks: str, n_layers: int) -> list[str]:
    """Module paths of all blocks: the output of the i-th (from 0) is residual layer i + 1."""
    return [f"{anatomy_blocks}.{i}" for i in range(n_layers)]


def residual_paths(model: nn.Module, anatomy: Anatomy) -> list[tuple[str, ...]]:
    """By residual layer, from 1: the modules whose outputs add up to it.

    It is the output of a block. Where blocks hold several streams, it is what the block's
    sublayers hand to the mixing, before it is weighed into them: the part that an edit changes.

    Raises:
        UnsupportedModel: for a block that lacks a sublayer.
    """
    if not anatomy.sublayers:
        return [(path,) for path in block_paths(anatomy.blocks, anatomy.n_layers)]
    modules = dict(model.named_modules())
    paths: list[tuple[str, ...]] = []
    for layer in range(anatomy.n_layers):
        slots = [[n.replace("{layer}", str(layer)) for n in names] for names in anatomy.sublayers]
        paths.append(tuple(next((n for n in names if n in modules), names[0]) for names in slots))
    return paths


def in_each_stream(hidden: Tensor, width: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A block's output with its residual stream changed, or each of its streams.

    Args:
        hidden: [B, T, H]; of several streams [B, T, S, H] or [B, T, S x H].
        width: H.
        change: called with [B, T, H] or [B, T, S, H].
    """
    if hidden.shape[-1] == width:
        return change(hidden)
    return change(hidden.view(*hidden.shape[:-1], -1, width)).flatten(-2)


def equal_length_batches(
    token_ids: Sequence[Sequence[int]], max_batch_tokens: int
) -> list[list[int]]:
    """Indices of prompts in batches of one token length each, so that no row is ever padded.

    Shortest first, in the given order within a length: the same prompts always make the same
    batches. A prompt longer than `max_batch_tokens` is a batch alone.
    """
    lengths: dict[int, list[int]] = {}
    for index, ids in enumerate(token_ids):
        lengths.setdefault(len(ids), []).append(index)
    batches = []
    for length, indices in sorted(lengths.items()):
        rows = max(1, max_batch_tokens // max(1, length))
        batches += [indices[i : i + rows] for i in range(0, len(indices), rows)]
    return batches


def remaining(batches: Iterable[list[int]], done: Container[int]) -> list[list[int]]:
    """The batches without the rows that are done, and without those that have no others."""
    kept = ([row for row in batch if row not in done] for batch in batches)
    return [batch for batch in kept if batch]


def run_batches(
    batches: Iterable[list[int]], run: Callable[[list[int]], T]
) -> Iterator[tuple[list[int], T]]:
    """Yields (batch, run(batch)), and halves what does not fit in memory, later batches too.

    Raises:
        GenerationError: if not even one row fits.
    """
    queue = deque(batches)
    limit: int | None = None
    while queue:
        batch = queue.popleft()
        if limit and len(batch) > limit:
            queue.extendleft((batch[limit:], batch[:limit]))
            continue
        try:
            result = run(batch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise_too_large(error)
            limit = len(batch) // 2
            queue.appendleft(batch)
        else:
            yield batch, result
            continue
        # Out of the except clause: until there, the traceback keeps the failed run's tensors alive.
        release_memory()


def raise_too_large(error: BaseException | None) -> NoReturn:
    """Raises GenerationError for one row that does not fit in memory."""
    raise GenerationError(
        "One prompt alone does not fit in the device's memory beside the model. Use "
        "shorter prompts or answers, a smaller dtype (`--dtype bfloat16`), a device "
        "with more memory, or `--device cpu`."
    ) from error


def cache_name(model: nn.Module) -> str:
    """Name of the cache of keys and values, as an argument of a model and in its output.

    `cache` from transformers 5.24 on, `past_key_values` before it and in models' own code.
    """
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


@contextmanager
def head_at(head: nn.Module, rows: Tensor, positions: Tensor) -> Iterator[None]:
    """Restricts the output head to the hidden states at given positions, as one row.

    The vocabulary is the largest dimension there is: logits of whole prompts would fill the memory.
    What a model does to its logits afterwards (scales, soft caps) is element by element.
    """

    def select(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows, positions][None], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def output_head(model: PreTrainedModel) -> nn.Module:
    """The module whose output are the logits.

    Raises:
        UnsupportedModel: for a model that has none.
    """
    head = _head_of(model)
    if head is None:
        raise UnsupportedModel(
            f"The loaded {type(model).__name__} has no output head, so it predicts no tokens. Use "
            "a causal language model."
        )
    return head


def _head_of(model: PreTrainedModel) -> nn.Module | None:
    """Some multimodal models leave the head to the language model that they hold."""
    head: nn.Module | None = model.get_output_embeddings()
    if head is None and hasattr(model, "language_model"):
        head = model.language_model.get_output_embeddings()
    return head


def copy_input_of_head(model: PreTrainedModel) -> None:
    """Gives the output head a copy of its input, one row after the other in memory.

    Only 16-bit inputs on a CPU are copied. Models pass the head a slice: the last positions of each
    row. Where rows do not follow one another, torch multiplies each with a copy of the whole head,
    which takes 30 to 100 times longer and gives the same bits. In float32 it makes no such copy,
    and the bits would differ; so they would for a head with a bias, which is left alone too.
    """
    head = _head_of(model)
    if head is not None and getattr(head, "bias", None) is None:
        head.register_forward_pre_hook(_with_copied_input)


def _with_copied_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    def copied(x: Any) -> Any:
        if isinstance(x, Tensor) and x.device.type == CPU and x.dtype.itemsize == 2:
            return x.clone(memory_format=torch.contiguous_format)
        return x

    return tuple(map(copied, args))


def stored_parameter(module: nn.Module, name: str) -> Tensor:
    """A copy of a parameter of a module, also where its weights lie in host memory or on disk."""
    from accelerate.utils import align_module_device

    with align_module_device(module), torch.inference_mode(False):
        return module.get_parameter(name).detach().clone()


def positions_from(model: nn.Module, start: int, ids: Tensor) -> dict[str, Tensor]:
    """Positions [N, T] of tokens that continue `start` others, for a forward pass that takes them.

    Left out, some models whose positions have several dimensions take those of an earlier call.
    """
    if not start or "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    rows, width = ids.shape
    positions = torch.arange(start, start + width, device=ids.device).expand(rows, width)
    return {"position_ids": positions}


def masked_positions(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """Positions [N, T] that do not count what `mask` leaves out, for a model that takes them.

    As `generate` makes them, for models that would take those of an earlier call instead.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 0)}


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModel(
            f"The loaded model has no module {path}, though the anatomy of its architecture names "
            "it. Use a checkpoint whose model_type is the one in its config.json, or a version of "
            "transformers that keeps this name."
        ) from None


def _adapted(hook: Hook | CallHook) -> Callable[[nn.Module, Any, Any, Any], Any]:
    """`hook` with torch's signature, for modules that return a tensor or a tuple of it and more."""
    owner = BATCH.get()

    def forward_hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if owner is not None and owner is not BATCH.get():
            return None

        def replaced(hidden: Tensor) -> Tensor | None:
            if not isinstance(hook, CallHook):
                return hook(hidden)
            return hook.run(hidden, inspect.signature(module.forward).bind(*args, **kwargs))

        replacement = replaced(output[0] if isinstance(output, tuple) and output else output)
        if replacement is None or not isinstance(output, tuple):
            return replacement
        return (replacement, *output[1:])

    return forward_hook
