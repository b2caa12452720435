"""Splits a reply of a reasoning model into its thinking and its answer.

A model's thinking is not its answer, whoever opened it (the chat template or the model) and
wherever a reply is cut. `formats.yaml` has the formats. `Splitter` works on what was generated,
with its control tokens; `split_text` on text alone, which shows less.

    split_text("<think>Shall I?</think>Yes.")
    # Split(thinking="<think>Shall I?</think>", answer="Yes.", is_known=True)
"""

from abliterator.thinking._split import Opened, Split, split_text, without_marks
from abliterator.thinking._tokens import Splitter

__all__ = ["Opened", "Split", "Splitter", "split_text", "without_marks"]
