"""Quantised forms of base and edited model, to measure what quantisation leaves of an edit.

fp8, int8, int4 and nvfp4 are rounded to nearest by compressed-tensors, GGUF types by llama.cpp's
own converter and quantiser, and answered through its server. Beside each quantised form comes a
folder with the numbers that it stores, which every other part of abliterator can read and run. What
is measured, and of which build, is outside this package.

    (entry,) = formats_named(["int4"])
    rounding = rounding_of(base, entry)
    n_bytes = write_rounded(base, rounding, scratch / "int4", scratch / "numbers")
"""

from abliterator.survival._compressed import (
    Rounding,
    require_package,
    require_plain,
    rounding_of,
    write_rounded,
)
from abliterator.survival._formats import FORMATS, QuantizedFormat, formats_named
from abliterator.survival._gguf import write_numbers
from abliterator.survival._llama_cpp import (
    LlamaCpp,
    commands,
    convert,
    find_llama_cpp,
    gguf_type,
    llama_server,
    quantize,
)
from abliterator.survival._strengths import surviving_strengths

__all__ = [
    "FORMATS",
    "LlamaCpp",
    "QuantizedFormat",
    "Rounding",
    "commands",
    "convert",
    "find_llama_cpp",
    "formats_named",
    "gguf_type",
    "llama_server",
    "quantize",
    "require_package",
    "require_plain",
    "rounding_of",
    "surviving_strengths",
    "write_numbers",
    "write_rounded",
]
