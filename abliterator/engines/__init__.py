"""Engines: hidden states, greedy answers, and log-probabilities along answers of a model.

`Engine` is the protocol, and `TransformersEngine` its implementation in this process. It hides
how the model runs: module paths, stop tokens, device and dtype, padding, caches and hooks. Every
method also works under an edit, or under several, one for each row of a batch.

    engine = TransformersEngine(load_model(folder, device="cpu", dtype="float32"))
    with engine.edited(WriterEdit(plan, basis)):
        engine.answers(prompts, max_new_tokens=64, batch_size=16)[0].text
"""

from abliterator.engines._edits import Edit, Steering, StreamEdit, WriterEdit
from abliterator.engines._open import open_engine
from abliterator.engines._protocol import (
    Answer,
    AnswerPath,
    Engine,
    OnBatch,
    Padding,
    SideBySide,
    Tokens,
)
from abliterator.engines._streamed import StreamedEngine, open_streamed
from abliterator.engines._transformers import TransformersEngine

__all__ = [
    "Answer",
    "AnswerPath",
    "Edit",
    "Engine",
    "OnBatch",
    "Padding",
    "SideBySide",
    "Steering",
    "StreamEdit",
    "StreamedEngine",
    "Tokens",
    "TransformersEngine",
    "WriterEdit",
    "open_engine",
    "open_streamed",
]
