"""Gradient descent: Adam on strengths and directions, through the preview of the edit."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from abliterator.engines import Steering, TransformersEngine
from abliterator.errors import DirectionError
from abliterator.evaluation import OnStep, kl_terms
from abliterator.tuning._kept import KeptSteps, dump_edit, dump_pairs, load_edit, load_pairs
from abliterator.tuning._parameters import EditParameters, mean_of, slow_down
from abliterator.tuning._rows import answer_logits, answer_logprobs, token_logprobs
from abliterator.tuning._types import PreferencePair, PreferencePairs, Row, TunedEdit, TuningContext

KEPT = 512 << 20  # bytes of the base's logits that are kept in the host's memory
LAST = 1 / 3  # of a phase's steps, whose mean is its result: single steps are noisy

T = TypeVar("T")
AskAgain = Callable[[PreferencePairs, TunedEdit], PreferencePairs]


def descend(
    context: TuningContext,
    pairs: PreferencePairs,
    basis: Tensor,
    *,
    on_step: OnStep,
    ask_again: AskAgain = lambda pairs, edit: pairs,
    kept: KeptSteps | None = None,
) -> list[TunedEdit]:
    """One edit at the end of each phase, in the order of the config's `kl_weights`.

    Minimises, over batches of preference pairs and of neutral rows,

        mean softplus(log p(rejected) - log p(answer)) - mean log p(answer) / tokens + w KL

    where what is rejected is the base's refusal or a response that the judge rejected after an
    earlier phase, one of them by chance in each step, and KL(base || edited) is in nats along
    neutral answers: the mean of the first token's and of all tokens', because an edit shows most
    where an answer begins. The config's `induce` is the weight of

        - mean log p(refusal | neutral prompt) / tokens,   h_l <- h_l + |d| q

    in the unedited model, q being the unit direction that is tuned, d the mean difference at the
    start's layer l, and the refusal the base's own to a target prompt (the addition term of refusal
    direction optimisation, Wollschläger et al. 2025, arXiv 2502.17420).

    With pairs (U, V), the config's ridge is added times the mean over modules of
    |U Vᵀ - U₀ V₀ᵀ|² / |U₀ V₀ᵀ|², U₀ and V₀ being those of the start.

    Args:
        context: the model, which writers are edited, and the config of the descent.
        pairs: from `make_pairs`.
        basis: Q [H, k] of the start, or [L, H, k] with one a block, or pairs [M, 2, H, r].
        on_step: called with each step that is done.
        ask_again: given the pairs and the edit that a phase ended with, the next phase's pairs.
        kept: steps that an interrupted descent with the same arguments finished.

    Raises:
        DirectionError: if the loss is not finite.
    """
    kept = kept or KeptSteps()
    descent = _Descent(context, pairs, basis, on_step)
    results: list[TunedEdit] = []
    for weight in context.config.kl_weights:
        if results:
            asked_again = partial(_asked_again, ask_again, descent.pairs, results[-1])
            descent.pairs = load_pairs(kept.value("rejected", asked_again))
        state = kept.value("phase", partial(descent.phase, weight))
        descent.restore(state)
        results.append(load_edit(state["edit"]))
    return results


def _asked_again(ask_again: AskAgain, pairs: PreferencePairs, edit: TunedEdit) -> Any:
    return dump_pairs(ask_again(pairs, edit))


class _Descent:
    """Parameters, order of the batches and random numbers of a descent, from phase to phase."""

    def __init__(
        self, context: TuningContext, pairs: PreferencePairs, basis: Tensor, on_step: OnStep
    ) -> None:
        self.pairs = pairs
        self._context, self._on_step = context, on_step
        self._parameters = EditParameters(context, basis)
        self._rng = random.Random(context.evaluation.seed)
        indices = range(len(pairs.neutral))
        self._neutral = _Batches(indices, context.config.batch, self._rng)
        self._base = _BaseLogits(context, pairs.neutral)

    def phase(self, weight: float) -> dict[str, Any]:
        """Descends with one weight of the KL; returns its edit, and what `restore` needs."""
        context, config, parameters = self._context, self._context.config, self._parameters
        target = _Batches(self.pairs.target, config.batch, self._rng)
        n_averaged = max(1, round(config.steps * LAST))
        optimiser = parameters.optimiser()
        last_edits: list[TunedEdit] = []
        for step in range(config.steps):
            slow_down(optimiser, step / config.steps)
            batch = [(Row(x.prompt, x.answer), _unwanted(x, self._rng)) for x in target.next()]
            chosen = self._neutral.next()
            neutral = [self.pairs.neutral[i] for i in chosen]
            base = self._base.at(chosen)
            preference_loss, kl = _losses(context, parameters, batch, neutral, base)
            loss = preference_loss + weight * kl + config.ridge * parameters.ridge()
            if config.induce and context.difference is not None:
                refusals = [_refusal_to(row, self.pairs.target, self._rng) for row in neutral]
                loss = loss + config.induce * _induce_loss(
                    context, parameters, context.difference, refusals
                )
            if not loss.isfinite():
                raise DirectionError(
                    "Tuning diverged: its loss is not finite. Try `--dtype float32`, or start from "
                    "another layer."
                )
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            if step >= config.steps - n_averaged:
                last_edits.append(parameters.edit())
            self._on_step(f"loss {preference_loss.item():.3g}, KL {kl.item():.3g}")
        return {
            "edit": dump_edit(mean_of(last_edits)),
            "parameters": parameters.values(),
            "random": self._rng.getstate(),
            "neutral": self._neutral.left,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the phase that returned `state`."""
        self._parameters.set_values(state["parameters"])
        version, numbers, gauss = state["random"]
        self._rng.setstate((version, tuple(numbers), gauss))
        self._neutral.left = list(state["neutral"])


def _unwanted(pair: PreferencePair, rng: random.Random) -> Row:
    return Row(pair.prompt, rng.choice((pair.refusal, *pair.rejected)))


def _refusal_to(row: Row, pairs: Sequence[PreferencePair], rng: random.Random) -> Row:
    return Row(row.prompt, rng.choice(pairs).refusal)


def _induce_loss(
    context: TuningContext,
    parameters: EditParameters,
    difference: Steering,
    refusals: Sequence[Row],
) -> Tensor:
    """Mean -log p of a token of `refusals`, nats, with the tuned direction added; a scalar.

    No writer is edited. What is added has the length of `difference`, and its layer.
    """
    direction = parameters.direction(difference.layer) * float(difference.direction.norm())
    with TransformersEngine(context.loaded).edited(Steering(difference.layer, direction)):
        of_rows = answer_logprobs(context.loaded, refusals)
    logprobs = [token_logprobs(x, r.answer) for x, r in zip(of_rows, refusals, strict=True)]
    return -torch.cat(logprobs).mean()


def _losses(
    context: TuningContext,
    parameters: EditParameters,
    pairs: Sequence[tuple[Row, Row]],
    neutral: Sequence[Row],
    base: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The preference loss on target prompts, and the KL on neutral ones; both scalars.

    Backpropagated together: the two batches run one after the other, so that rows of one kind, of
    similar length, share their padding.

    Args:
        context: the model.
        parameters: of the edit.
        pairs: an answer to a target prompt, and what must become less likely than it.
        neutral: answers that must stay.
        base: logits of the base at every token of each of these.
    """
    rows = [answer for answer, _ in pairs] + [unwanted for _, unwanted in pairs]
    with parameters.applied():
        of_rows = [
            token_logprobs(logprobs, row.answer)
            for row, logprobs in zip(rows, answer_logprobs(context.loaded, rows), strict=True)
        ]
        edited = answer_logprobs(context.loaded, neutral)
    answers, unwanted = of_rows[: len(pairs)], of_rows[len(pairs) :]
    margins = torch.stack([u.sum() - a.sum() for u, a in zip(unwanted, answers, strict=True)])
    kl = [
        kl_terms(b.to(e.device).float().log_softmax(dim=1), e).sum(dim=1)
        for b, e in zip(base, edited, strict=True)
    ]
    preference_loss = softplus(margins).mean() - torch.cat(answers).mean()
    return preference_loss, (torch.cat(kl).mean() + torch.stack([row[0] for row in kl]).mean()) / 2


class _BaseLogits:
    """Logits of the base along neutral answers, computed once where they fit in `KEPT` bytes.

    Rows run in the same groups whatever is asked for, so that each has the same bits in every run.
    """

    def __init__(self, context: TuningContext, rows: Sequence[Row]) -> None:
        self._context, self._rows, self._kept = context, rows, dict[int, Tensor]()
        model = context.loaded.model
        vocabulary = model.config.get_text_config().vocab_size
        positions = sum(len(row.answer) for row in rows)
        self._fits = positions * vocabulary * model.dtype.itemsize <= KEPT

    def at(self, indices: Sequence[int]) -> list[Tensor]:
        """[len(answer), V] logits of each row, in the model's dtype."""
        if not self._fits:
            return self._of(indices)
        size = self._context.config.batch
        for start in sorted({i - i % size for i in indices if i not in self._kept}):
            group = range(start, min(start + size, len(self._rows)))
            logits = self._of(group)
            self._kept.update((i, x.cpu()) for i, x in zip(group, logits, strict=True))
        return [self._kept[i] for i in indices]

    @torch.no_grad()
    def _of(self, indices: Sequence[int]) -> list[Tensor]:
        return list(answer_logits(self._context.loaded, [self._rows[i] for i in indices]))


class _Batches(Generic[T]):
    """Endless batches: all items in a new order each time round.

    Attributes:
        left: indices of the batches that are left of this round.
    """

    def __init__(self, items: Sequence[T], size: int, rng: random.Random) -> None:
        self._items, self._size, self._rng = items, size, rng
        self.left: list[list[int]] = []

    def next(self) -> list[T]:
        """The next batch."""
        if not self.left:
            n, size = len(self._items), self._size
            order = self._rng.sample(range(n), n)
            starts = range(0, max(1, n - size + 1), size)
            self.left = [order[start : start + size] for start in starts]
        return [self._items[i] for i in self.left.pop(0)]
