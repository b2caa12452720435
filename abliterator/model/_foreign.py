"""Converts exceptions of a library that reads files of unknown origin to one named error.

A folder's config, tokenizer or code can make transformers, tokenizers or torch raise anything. So
the boundary is a place, not a list of types: the block of the context manager holds calls into the
library and nothing of ours, whose mistakes are to keep their traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from abliterator.errors import AbliteratorError, GenerationError
from abliterator.processes import Terminated


@contextmanager
def foreign(
    problem: str, advice: str, *, error: type[AbliteratorError] = GenerationError
) -> Iterator[None]:
    """Converts exceptions of the block to `error`: the problem, the exception, the advice.

    That includes what does not derive from Exception: a panic of a library in Rust, and `sys.exit`
    in a model's own code. Interruption by the user or a signal, and errors that have a name
    already, pass.

    Args:
        problem: what cannot be done, without a full stop: "transformers cannot load the model in
            FOLDER".
        advice: what to do, a sentence.
        error: the kind of error.

    Raises:
        AbliteratorError: of the kind `error`, chained to what was raised.
    """
    try:
        yield
    except (AbliteratorError, KeyboardInterrupt, Terminated, GeneratorExit):
        raise
    except BaseException as raised:
        raise error(f"{problem}: {as_sentence(raised)} {advice}") from raised


def as_sentence(raised: BaseException) -> str:
    """The message of an exception as one printable sentence of at most 300 characters."""
    try:
        text = str(raised)
    except Exception:  # noqa: BLE001 - the __str__ of a model's own code
        text = ""
    text = " ".join(text.split())
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    message = text if isinstance(raised, (OSError, ValueError, RuntimeError)) and text else None
    text = message or f"{type(raised).__name__}: {text}".rstrip(": ")
    text = text if len(text) <= 300 else text[:297] + "..."
    return text if text.endswith((".", "!", "?")) else text + "."
