"""From moments to directions, from directions to the subspace that is removed, and both as files.

Reads moments of prompt sets and writes one artefact, directions.safetensors, with `directions`
[L, H] (row l - 1 belongs to residual layer l) and `subspace` [H, k], or [L, H, k] where each block
has one of its own. `PublishedDirections` is the file of a checkpoint that others read: it also
states which modules are edited, and how strongly.

    directions = fit_directions(target, contrast)
    subspace = stack(directions, layers=(16, 15, 17))
    with load_directions("out/checkpoint").ablated(model): ...
"""

from abliterator.directions._control_vector import save_control_vector
from abliterator.directions._fit import (
    Directions,
    Place,
    Position,
    Subspace,
    fit_directions,
    fit_shuffled,
    per_layer,
    position_order,
    stack,
    stack_at,
    within_layer,
)
from abliterator.directions._published import (
    PUBLISHED,
    PublishedDirections,
    Site,
    load_directions,
    save_published,
)
from abliterator.directions._stored import load_subspace, save_directions

__all__ = [
    "PUBLISHED",
    "Directions",
    "Place",
    "Position",
    "PublishedDirections",
    "Site",
    "Subspace",
    "fit_directions",
    "fit_shuffled",
    "load_directions",
    "load_subspace",
    "per_layer",
    "position_order",
    "save_control_vector",
    "save_directions",
    "save_published",
    "stack",
    "stack_at",
    "within_layer",
]
