"""From moments to directions, from directions to the subspace that is removed, and both as files.

Reads moments of prompt sets and writes one artefact, directions.safetensors, with `directions`
[L, H] (row l - 1 belongs to residual layer l) and `subspace` [H, k], or [L, H, k] where each block
has one of its own. `PublishedDirections` is the file of a checkpoint that others read: it also
states which modules are edited, and how strongly.

    directions = estimate("mean_difference", Observations(target, contrast))
    subspace = subspace_of("layers", Sources(observations, directions), layers=(16, 15), k=2)
    with load_directions("out/checkpoint").ablated(model): ...
"""

from abliterator.directions._checks import ProtectedShare, cosines_between, leave_one_set_out
from abliterator.directions._control_vector import save_control_vector
from abliterator.directions._estimators import (
    ESTIMATORS,
    Cleaning,
    Estimator,
    estimate,
    estimator_of,
)
from abliterator.directions._fit import (
    AnyPlace,
    Directions,
    Node,
    Place,
    Position,
    Subspace,
    fit_directions,
    fit_shuffled,
    nodes_of,
    per_layer,
    position_order,
    stack,
    stack_at,
    within_layer,
)
from abliterator.directions._map import map_directions
from abliterator.directions._observations import Observations, moments_of
from abliterator.directions._published import (
    PUBLISHED,
    PublishedDirections,
    Site,
    load_directions,
    save_published,
)
from abliterator.directions._sequential import left_behind, sequential_removal
from abliterator.directions._stacks import STACKS, Sources, StackMethod, first_within, subspace_of
from abliterator.directions._stored import load_subspace, save_directions

__all__ = [
    "ESTIMATORS",
    "PUBLISHED",
    "STACKS",
    "AnyPlace",
    "Cleaning",
    "Directions",
    "Estimator",
    "Node",
    "Observations",
    "Place",
    "Position",
    "ProtectedShare",
    "PublishedDirections",
    "Site",
    "Sources",
    "StackMethod",
    "Subspace",
    "cosines_between",
    "estimate",
    "estimator_of",
    "first_within",
    "fit_directions",
    "fit_shuffled",
    "leave_one_set_out",
    "left_behind",
    "load_directions",
    "load_subspace",
    "map_directions",
    "moments_of",
    "nodes_of",
    "per_layer",
    "position_order",
    "save_control_vector",
    "save_directions",
    "save_published",
    "sequential_removal",
    "stack",
    "stack_at",
    "subspace_of",
    "within_layer",
]
