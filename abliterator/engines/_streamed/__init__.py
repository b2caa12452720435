"""An engine for models that fit in no memory: weights are read block by block, once for all."""

from abliterator.engines._streamed._engine import StreamedEngine, open_streamed

__all__ = ["StreamedEngine", "open_streamed"]
