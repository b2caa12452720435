"""Which tensors of a checkpoint write the residual stream: a table per architecture.

The table is `architectures.yaml` beside this file. A *writer* is a tensor whose product is added to
the residual stream. This package reads a parsed config.json and tensor names with their shapes; it
opens no checkpoint, handles no directions, and never infers a side from a shape. Nothing is skipped
silently: a tensor that the table does not claim is an error that names it.

    anatomy = anatomy_of(json.loads(read_text(folder / "config.json")))
    for writer in anatomy.writers({"model.embed_tokens.weight": (49152, 576), ...}):
        writer.name, writer.component, writer.layer, writer.axis
"""

from abliterator.anatomy._anatomy import Anatomy, Kind, Shape, Writer, broad_component
from abliterator.anatomy._config import (
    anatomy_of,
    known_model_types,
    partial_model_types,
    partial_reason,
    refused_model_types,
    require_countable,
)
from abliterator.anatomy._table import Component

__all__ = [
    "Anatomy",
    "Component",
    "Kind",
    "Shape",
    "Writer",
    "anatomy_of",
    "broad_component",
    "known_model_types",
    "partial_model_types",
    "partial_reason",
    "refused_model_types",
    "require_countable",
]
