"""Moments of the base model's residual stream over prompts, in every layer.

The stage writes work/moments.safetensors, from which `fitted` makes directions.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from abliterator.errors import DirectionError
from abliterator.files import write_bytes_atomic
from abliterator.pipeline._captured import CapturedSet
from abliterator.pipeline._kept import partial_file
from abliterator.pipeline._positions import Reading, captured_positions, readings
from abliterator.pipeline._run import Run
from abliterator.pipeline._stage import Artefact, Stage
from abliterator.pipeline.stages.prompts import prompt_sets

if TYPE_CHECKING:
    from torch import Tensor

    from abliterator.directions import Cleaning, Directions, Observations, Position
    from abliterator.engines import Engine
    from abliterator.prompts import PromptSet
    from abliterator.subspace import MomentSet

T = TypeVar("T")

MOMENTS = Artefact("capture", "work/moments.safetensors")
# target - contrast of every pair, [pairs, L, H] float32 by position; only for `within_layer`
DIFFERENCES = Artefact("capture", "work/differences.safetensors")
# every prompt's vectors, [N, L, H] float32 as SET@POSITION; only where an estimator or stack reads
VECTORS = Artefact("capture", "work/vectors.safetensors")


def _key(run: Run) -> Any:
    recipe = run.recipe
    thinks = "after_thinking" in recipe.directions.positions
    return [
        run.base_digest(),
        run.section("chat"),
        run.section("capture"),
        recipe.directions.position,
        [recipe.directions.stack, prompt_sets(run).pairs, _shuffles(run), recipe.seed],
        {name: s.sha256 for name, s in _captured(run).items()},
        run.dtype,
        *([recipe.rollouts.most_thinking] if thinks else []),
        # with a stack of paired differences the key has the stack already
        *([stored] if (stored := sorted(recipe.directions.stored_sets - {"differences"})) else []),
    ]


def position_of(run: Run) -> Position:
    """The recipe's position; where it is swept, the last token."""
    directions = run.recipe.directions
    return -1 if directions.sweeps_positions else directions.positions[0]


def _captured(run: Run) -> dict[str, PromptSet]:
    """The prompt sets whose moments directions are fitted to."""
    sets = prompt_sets(run).extraction
    unused = set() if run.recipe.needs_neutral_mean else {"neutral"}
    return {name: prompts for name, prompts in sets.items() if name not in unused}


def _shuffles(run: Run) -> int:
    """Shuffles of the labels whose directions are controls of `k: auto`."""
    if run.recipe.k != "auto":
        return 0
    selection, within = run.recipe.selection, run.recipe.directions.of_one_layer
    # k directions of one layer need k shuffles; those of k layers may come from one
    return selection.controls * (max(selection.stacks) if within else 1)


def _run(run: Run) -> list[Path]:
    from safetensors.torch import save

    from abliterator.capture import save_moments

    engine = run.engine(run.plan.source.folder)
    positions = captured_positions(run, engine)
    stored = run.recipe.directions.stored_sets
    moments: dict[str, MomentSet] = {}
    vectors: dict[tuple[str, Position], tuple[Sequence[int], Tensor]] = {}
    for name, prompts in _captured(run).items():
        for reading in readings(run, engine, name, prompts.prompts, positions):
            captured = _capture_set(run, engine, name, len(prompts.prompts), reading)
            for (part, position), moments_there in captured.frozen().items():
                moments[part if len(positions) == 1 else f"{part}@{position}"] = moments_there
            if captured.vectors is not None:
                for i, position in enumerate(reading.positions):
                    vectors[name, position] = reading.rows, captured.vectors[:, i]
    save_moments(MOMENTS.path(run), moments)
    written = [MOMENTS.path(run)]
    if "differences" in stored:
        pairs = prompt_sets(run).pairs
        differences = {
            str(p): _paired(pairs, vectors["target", p], vectors["contrast", p]) for p in positions
        }
        write_bytes_atomic(DIFFERENCES.path(run), save(differences))
        written.append(DIFFERENCES.path(run))
    if tensors := {
        f"{name}@{position}": of_set.contiguous()
        for (name, position), (_, of_set) in vectors.items()
        if name in stored
    }:
        write_bytes_atomic(VECTORS.path(run), save(tensors))
        written.append(VECTORS.path(run))
    return written


def _paired(
    pairs: Sequence[tuple[int, int]],
    target_vectors: tuple[Sequence[int], Tensor],
    contrast_vectors: tuple[Sequence[int], Tensor],
) -> Tensor:
    """[pairs, L, H] target - contrast, of the pairs that were captured on both sides.

    Args:
        pairs: indices of a target and a contrast prompt.
        target_vectors: indices of the captured target prompts, and their vectors [N, L, H].
        contrast_vectors: the same.
    """
    import torch

    target, contrast = (
        dict(zip(*vectors, strict=True)) for vectors in (target_vectors, contrast_vectors)
    )
    captured = [(t, c) for t, c in pairs if t in target and c in contrast]
    if not captured:
        raise DirectionError(
            "No pair of prompts has both of its sides captured at `directions.position`. Raise "
            "`rollouts.thinking_tokens`, or take another position."
        )
    return torch.stack([target[t] - contrast[c] for t, c in captured])


def _capture_set(run: Run, engine: Engine, name: str, n: int, reading: Reading) -> CapturedSet:
    """Moments of a set and of a random half of it for each shuffle; vectors where they are used."""
    import torch

    anatomy, settings = run.plan.anatomy, run.recipe.capture
    members: dict[str, Collection[int]] = {name: range(n)}
    for i in range(_shuffles(run) if name in ("target", "contrast") else 0):
        half = random.Random(f"{run.recipe.seed} {name} {i}").sample(range(n), n // 2)
        members[f"{name}/half{i}"] = frozenset(half)
    shape, rows = (anatomy.n_layers, anatomy.d_model), reading.rows
    stored = run.recipe.directions.stored_sets
    one_by_one = name in stored or ("differences" in stored and name in ("target", "contrast"))
    named = "".join(f"-{p}" for p in reading.positions if isinstance(p, str))
    captured = CapturedSet(
        partial_file(run, "capture", f"{name}{named}.safetensors", [name, _key(run)]),
        {
            part: frozenset(i for i, row in enumerate(rows) if row in of)
            for part, of in members.items()
        },
        reading.positions,
        shape,
        vectors=torch.zeros(len(rows), len(reading.positions), *shape) if one_by_one else None,
    )
    with run.progress.bar(f"capture {name}", len(rows) - len(captured.done)) as advance:
        try:
            for batch, residuals in engine.hidden_states(
                reading.token_ids,
                positions=reading.offsets,
                padding=settings.padding,
                max_batch_tokens=settings.max_batch_tokens,
                share_prefix=settings.share_prefix,
                skipped=frozenset(captured.done),
            ):
                captured.add(batch, residuals)
                advance(len(batch))
        finally:
            captured.write()
    return captured


def _read_position(name: str) -> Position:
    return int(name) if name.startswith("-") else name


def _by_position(values: Mapping[Position, T]) -> dict[Position, T]:
    """The same in the order of positions, -1 first."""
    from abliterator.directions import position_order

    return {position: values[position] for position in sorted(values, key=position_order)}


def _moments(run: Run) -> dict[Position, dict[str, MomentSet]]:
    """Moments by position and part; -1 first."""
    from abliterator.capture import load_moments

    by_position: dict[Position, dict[str, MomentSet]] = {}
    for name, moments in load_moments(MOMENTS.checked(run)).items():
        part, _, suffix = name.partition("@")
        position = _read_position(suffix) if suffix else position_of(run)
        by_position.setdefault(position, {})[part] = moments
    return _by_position(by_position)


def observations(run: Run) -> dict[Position, Observations]:
    """What directions are estimated from, by position."""
    from safetensors.torch import load_file

    from abliterator.directions import Observations

    stored = run.recipe.directions.stored_sets
    vectors: dict[tuple[str, Position], Tensor] = {}
    if "differences" in stored:
        for position, pairs in load_file(DIFFERENCES.checked(run)).items():
            vectors["differences", _read_position(position)] = pairs
    if stored - {"differences"}:
        for key, of_set in load_file(VECTORS.checked(run)).items():
            name, _, position = key.partition("@")
            vectors[name, _read_position(position)] = of_set
    return {
        position: Observations(
            target=moments["target"],
            contrast=moments["contrast"],
            neutral=moments.get("neutral"),
            protected={
                part.removeprefix("protect."): moments[part]
                for part in moments
                if part.startswith("protect.")
            },
            vectors={name: of_set for (name, p), of_set in vectors.items() if p == position},
        )
        for position, moments in _moments(run).items()
    }


def cleaning(run: Run) -> Cleaning:
    """What the recipe removes from every estimated direction."""
    from abliterator.directions import Cleaning

    settings = run.recipe.directions
    return Cleaning(projection=settings.projection == "neutral", ridge=settings.ridge)


def fitted(run: Run) -> dict[Position, Directions]:
    """The directions of all layers by position, as extracted."""
    from abliterator.directions import estimate

    name = run.recipe.directions.extracted
    return {
        position: estimate(name, observed, cleaning(run))
        for position, observed in observations(run).items()
    }


def shuffled(run: Run) -> list[dict[Position, Directions]]:
    """Directions of shuffled labels by position, one mapping a shuffle.

    Of the recipe's estimator; what it removes from directions is left in these.
    """
    from abliterator.directions import ESTIMATORS, estimate, fit_shuffled

    name = run.recipe.directions.extracted
    if ESTIMATORS[name].needs_vectors:
        by_position = observations(run)
        return [
            {p: estimate(name, _shuffled(run, o, i)) for p, o in by_position.items()}
            for i in range(_shuffles(run))
        ]
    return [
        {
            position: fit_shuffled(
                (moments["target"], moments[f"target/half{i}"]),
                (moments["contrast"], moments[f"contrast/half{i}"]),
            )
            for position, moments in _moments(run).items()
        }
        for i in range(_shuffles(run))
    ]


def _shuffled(run: Run, observed: Observations, draw: int) -> Observations:
    """The same vectors under shuffled labels: a random half of each kind against the others."""
    import torch

    from abliterator.directions import Observations

    halves: tuple[list[Tensor], list[Tensor]] = [], []
    for name in ("target", "contrast"):
        vectors = observed.vectors[name]
        order = list(range(len(vectors)))
        random.Random(f"{run.recipe.seed} {name} {draw}").shuffle(order)
        halves[0].append(vectors[order[::2]])
        halves[1].append(vectors[order[1::2]])
    return Observations.of_vectors(*(torch.cat(half) for half in halves))


CAPTURE = Stage("capture", 2, _key, _run, asks_model=True)
