"""Engines: hidden states, greedy answers, and log-probabilities along answers of a model.

`Engine` is the protocol, `TransformersEngine` its implementation in this process, and
`DistributedEngine` the same on several workers. It hides
how the model runs: module paths, stop tokens, device and dtype, padding, caches and hooks. Every
method also works under an edit, or under several, one for each row of a batch. `ServedEngine` has
its answers from a server, and all else from another engine, which is built when it is needed.

    engine = TransformersEngine(load_model(folder, device="cpu", dtype="float32"))
    with engine.edited(WriterEdit(plan, basis)):
        engine.answers(prompts, max_new_tokens=64, batch_size=16)[0].text
"""

from abliterator.engines._completions import CompletionClient, Form
from abliterator.engines._distributed import DistributedEngine
from abliterator.engines._edits import Edit, Steering, StreamEdit, WriterEdit
from abliterator.engines._generate import answer_of
from abliterator.engines._open import open_engine
from abliterator.engines._probe import Probed, probe, require_two_models
from abliterator.engines._protocol import (
    Answer,
    AnswerPath,
    Engine,
    OnBatch,
    Padding,
    SideBySide,
    Tokens,
)
from abliterator.engines._remote import ModelFolder, SharedFolder
from abliterator.engines._sampling import Sampling
from abliterator.engines._served import Served, ServedByName, ServedEngine, ServedModel
from abliterator.engines._streamed import StreamedEngine, open_streamed
from abliterator.engines._transformers import TransformersEngine
from abliterator.engines._vllm import Served as VllmCheckpoint
from abliterator.engines._vllm import VllmModel, slots_for

__all__ = [
    "Answer",
    "AnswerPath",
    "CompletionClient",
    "DistributedEngine",
    "Edit",
    "Engine",
    "Form",
    "ModelFolder",
    "OnBatch",
    "Padding",
    "Probed",
    "Sampling",
    "Served",
    "ServedByName",
    "ServedEngine",
    "ServedModel",
    "SharedFolder",
    "SideBySide",
    "Steering",
    "StreamEdit",
    "StreamedEngine",
    "Tokens",
    "TransformersEngine",
    "VllmCheckpoint",
    "VllmModel",
    "WriterEdit",
    "answer_of",
    "open_engine",
    "open_streamed",
    "probe",
    "require_two_models",
    "slots_for",
]
