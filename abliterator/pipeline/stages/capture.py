"""Moments of the base model's residual stream over prompts, in every layer.

The stage writes work/moments.safetensors, from which `fitted` makes directions.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.errors import DirectionError
from abliterator.files import write_bytes_atomic
from abliterator.pipeline._captured import CapturedSet
from abliterator.pipeline._kept import partial_file
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.prompts import prompt_sets

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.directions import Directions
    from abliterator.engines import Engine
    from abliterator.prompts import PromptSet
    from abliterator.subspace import MomentSet


MOMENTS = Artefact("capture", "work/moments.safetensors")
# target - contrast of every pair, [pairs, L, H] float32 by position; only for `within_layer`
DIFFERENCES = Artefact("capture", "work/differences.safetensors")


def _key(run: Run) -> Any:
    recipe = run.recipe
    return [
        run.base_digest(),
        run.section("chat"),
        run.section("capture"),
        recipe.directions.position,
        [recipe.directions.stack, prompt_sets(run).pairs, _shuffles(run), recipe.seed],
        {name: s.sha256 for name, s in _captured(run).items()},
        run.dtype,
    ]


def position_of(run: Run) -> int:
    """The recipe's position; where it is swept, the last token."""
    position = run.recipe.directions.position
    return -1 if position == "sweep" else position


def _captured(run: Run) -> dict[str, PromptSet]:
    """The prompt sets whose moments directions are fitted to."""
    sets = prompt_sets(run).extraction
    unused = {"neutral"} if run.recipe.directions.projection == "none" else set()
    return {name: prompts for name, prompts in sets.items() if name not in unused}


def _shuffles(run: Run) -> int:
    """Shuffles of the labels whose directions are controls of `k: auto`."""
    if run.recipe.k != "auto":
        return 0
    selection, within = run.recipe.selection, run.recipe.directions.stack == "within_layer"
    # k directions of one layer need k shuffles; those of k layers may come from one
    return selection.controls * (max(selection.stacks) if within else 1)


def _run(run: Run) -> list[Path]:
    from safetensors.torch import save

    from abliterator.capture import save_moments

    engine = run.engine(run.plan.source.folder)
    positions = _positions(run, engine)
    moments: dict[str, MomentSet] = {}
    vectors: dict[str, Tensor] = {}
    for name, prompts in _captured(run).items():
        moments_of_set, vectors_of_set = _capture_set(run, engine, name, prompts, positions)
        moments |= moments_of_set
        vectors |= {name: vectors_of_set} if vectors_of_set is not None else {}
    save_moments(MOMENTS.path(run), moments)
    if not vectors:
        return [MOMENTS.path(run)]
    target, contrast = (list(side) for side in zip(*prompt_sets(run).pairs, strict=True))
    pairs = vectors["target"][target] - vectors["contrast"][contrast]
    tensors = {str(p): pairs[:, i].contiguous() for i, p in enumerate(positions)}
    write_bytes_atomic(DIFFERENCES.path(run), save(tensors))
    return [MOMENTS.path(run), DIFFERENCES.path(run)]


def _positions(run: Run, engine: Engine) -> tuple[int, ...]:
    """The positions that are captured, -1 first.

    Raises:
        DirectionError: for a position that the chat template does not have.
    """
    from abliterator.model import template_tail

    chat, position = run.recipe.chat, run.recipe.directions.position
    tail = template_tail(engine.tokenizer, system=chat.system, template_kwargs=chat.template_kwargs)
    layout = f"The chat template puts {len(tail)} tokens after every prompt"
    if position == "sweep":
        if not tail:
            raise DirectionError(
                f"{layout}, so there is no position to sweep. Leave `position: -1`."
            )
        return tuple(range(-1, -len(tail) - 1, -1))
    if position < -len(tail) and position != -1:
        raise DirectionError(
            f"{layout}, so `directions.position` can be -1 to {-len(tail)}; it is {position}."
        )
    return (position,)


def _capture_set(
    run: Run, engine: Engine, name: str, prompts: PromptSet, positions: tuple[int, ...]
) -> tuple[dict[str, MomentSet], Tensor | None]:
    """Moments of a set, and of a random half of it for each shuffle; for pairs all vectors too."""
    import torch

    n, anatomy, settings = len(prompts.prompts), run.plan.anatomy, run.recipe.capture
    parts: dict[str, frozenset[int]] = {name: frozenset(range(n))}
    for i in range(_shuffles(run) if name in ("target", "contrast") else 0):
        half = random.Random(f"{run.recipe.seed} {name} {i}").sample(range(n), n // 2)
        parts[f"{name}/half{i}"] = frozenset(half)
    shape = anatomy.n_layers, anatomy.d_model
    paired = run.recipe.directions.stack == "within_layer" and name in ("target", "contrast")
    captured = CapturedSet(
        partial_file(run, "capture", f"{name}.safetensors", [name, _key(run)]),
        parts,
        positions,
        shape,
        vectors=torch.zeros(n, len(positions), *shape) if paired else None,
    )
    token_ids = run.render(engine, prompts.prompts, name=name).token_ids
    with run.progress.bar(f"capture {name}", n - len(captured.done)) as advance:
        try:
            for batch, residuals in engine.hidden_states(
                token_ids,
                positions=positions,
                padding=settings.padding,
                max_batch_tokens=settings.max_batch_tokens,
                skipped=frozenset(captured.done),
            ):
                captured.add(batch, residuals)
                advance(len(batch))
        finally:
            captured.write()
    return captured.frozen(), captured.vectors


def differences(run: Run) -> dict[int, Tensor]:
    """Paired differences [N, L, H] by position; none where stacks are of layers."""
    from safetensors.torch import load_file

    if run.recipe.directions.stack != "within_layer":
        return {}
    tensors = load_file(DIFFERENCES.checked(run))
    return {int(position): tensors[position] for position in sorted(tensors, key=int, reverse=True)}


def _moments(run: Run) -> dict[int, dict[str, MomentSet]]:
    """Moments by position and part; -1 first."""
    from abliterator.capture import load_moments

    by_position: dict[int, dict[str, MomentSet]] = {}
    for name, moments in load_moments(MOMENTS.checked(run)).items():
        part, _, position = name.partition("@")
        index = int(position) if position else position_of(run)
        by_position.setdefault(index, {})[part] = moments
    return {position: by_position[position] for position in sorted(by_position, reverse=True)}


def fitted(run: Run) -> dict[int, Directions]:
    """The directions of all layers by position, from the captured moments."""
    from abliterator.directions import fit_directions

    projected = run.recipe.directions.projection == "neutral"
    return {
        position: fit_directions(
            moments["target"],
            moments["contrast"],
            remove_mean_of=moments.get("neutral", moments["contrast"]) if projected else None,
        )
        for position, moments in _moments(run).items()
    }


def shuffled(run: Run) -> list[dict[int, Directions]]:
    """Directions of shuffled labels by position, one mapping a shuffle."""
    from abliterator.directions import fit_shuffled

    by_position = _moments(run)
    return [
        {
            position: fit_shuffled(
                (moments["target"], moments[f"target/half{i}"]),
                (moments["contrast"], moments[f"contrast/half{i}"]),
            )
            for position, moments in by_position.items()
        }
        for i in range(_shuffles(run))
    ]


CAPTURE = Stage("capture", 2, _key, _run, asks_model=True)
