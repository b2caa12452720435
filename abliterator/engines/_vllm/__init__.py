"""vLLM as an engine: found, started and ended, and given candidates as adapters or baked folders.

The server is a process of another environment, as a rule: nothing here imports vLLM.

    served = VllmModel(find_vllm(python), Served(folder, "base"), settings, identity, ...)
    engine = ServedEngine(folder, tokenizer, served, passes)
"""

from abliterator.engines._vllm._adapters import slots_for
from abliterator.engines._vllm._command import Served, dtype_of, slot_rank
from abliterator.engines._vllm._model import VllmModel
from abliterator.engines._vllm._process import VllmServer

__all__ = [
    "Served",
    "VllmModel",
    "VllmServer",
    "dtype_of",
    "slot_rank",
    "slots_for",
]
