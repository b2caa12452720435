"""Token ids of what a local judge reads, and of what it may write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from abliterator.errors import JudgeError, UnsupportedModel
from abliterator.judge._local._format import Format
from abliterator.server import delimiter, filled, neutralize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from abliterator.engines import Engine, Tokens

MAX_BATCH_TOKENS = 4096
_SAMPLE = ("Name a planet.", "Mars.")
_MARKER = 9  # characters of a marker: digits are tokens of their own in many vocabularies
_PLAIN = {"enable_thinking": False}  # where the template knows it: the reply begins at once


class Shown(NamedTuple):
    """What a judge reads of one answer.

    Attributes:
        token_ids: of the prompt; None where the question alone is longer than what it reads.
        kept: tokens of the answer that are in it, where it had to be cut.
    """

    token_ids: Tokens | None
    kept: int | None = None


@dataclass(frozen=True)
class Asker:
    """A format in the tokens of one model.

    Attributes:
        engine: the model.
        format: what it is shown and may write.
        name: of the model, for errors.
    """

    engine: Engine
    format: Format
    name: str

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self.engine.tokenizer

    @cached_property
    def outputs(self) -> list[Tokens]:
        """Token ids of each output of the format, none the beginning of another's.

        Where one would be, all outputs to that question end in the model's end of turn: their
        probabilities are then those of disjoint texts, whatever their lengths.

        Raises:
            JudgeError: if two outputs with different words are the same tokens.
        """
        prompt = self._text(*_SAMPLE)
        tokens = [self._continuation(prompt, output.text) for output in self.format.outputs]
        for indices in self.format.questions:
            ids = {i: tokens[i] for i in indices}
            if any(_begins(a, b) for a in ids.values() for b in ids.values() if a != b):
                for i in indices:
                    tokens[i] = (*tokens[i], self.engine.stop_ids[0])
            self._require_different(indices, tokens)
        return tokens

    def _require_different(self, indices: Sequence[int], tokens: Sequence[Tokens]) -> None:
        seen: dict[Tokens, int] = {}
        for i in indices:
            first = seen.setdefault(tokens[i], i)
            one, other = self.format.outputs[first], self.format.outputs[i]
            if not tokens[i] or one.words != other.words:
                raise JudgeError(
                    f"The vocabulary of the judge {self.name} has the same tokens for "
                    f"{one.text!r} and {other.text!r}, so it cannot tell them apart. Take another "
                    "model as the judge."
                )

    def log_likelihoods(self, prompts: Sequence[Tokens]) -> list[list[float]]:
        """Log-probabilities of the outputs after each prompt; -inf of one that is there already."""
        table = self.engine.log_likelihoods(
            prompts, self.outputs, max_batch_tokens=MAX_BATCH_TOKENS, together=True
        )
        table[:, sorted(self.repeated)] = -math.inf
        rows: list[list[float]] = table.tolist()
        return rows

    @property
    def repeated(self) -> set[int]:
        """Outputs whose tokens an earlier one has already: they are not counted twice."""
        return {i for i, ids in enumerate(self.outputs) if ids in self.outputs[:i]}

    @cached_property
    def _room(self) -> int | None:
        """Tokens of the longest prompt."""
        context = self.engine.limits.context
        return None if context is None else context - max(map(len, self.outputs))

    def shown(self, question: str, answer: str) -> Shown:
        """The prompt that shows an answer; one that is too long is cut at its end.

        How an answer begins says more of refusal than how it ends, and the question is never cut.
        """
        question, answer = neutralize(question), neutralize(answer)
        ids = self._ids(question, answer)
        limit, room = self.format.answer_tokens, self._room
        parts = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        kept = len(parts) if limit is None else min(limit, len(parts))
        while True:
            if kept < len(parts):
                ids = self._ids(question, self._tokenizer.decode(parts[:kept]))
            excess = 0 if room is None else len(ids) - room
            if excess <= 0:
                return Shown(ids, kept if kept < len(parts) else None)
            if excess >= kept:
                return Shown(None)
            kept -= excess

    def _ids(self, question: str, answer: str) -> Tokens:
        return self._encoded(self._text(question, answer))

    def _encoded(self, text: str) -> Tokens:
        # a chat template writes the special tokens, a text of ours does not
        with_special = self.format.prompt == "text"
        return tuple(self._tokenizer(text, add_special_tokens=with_special)["input_ids"])

    def _continuation(self, prompt: str, text: str) -> Tokens:
        """Tokens of `text` after a prompt; as they are alone where both melt into one token."""
        before, whole = self._encoded(prompt), self._encoded(prompt + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, question: str, answer: str) -> str:
        texts = self.format.texts
        places = {"question": question, "answer": answer}
        if self.format.prompt == "text":
            return filled(texts["text"], places)
        if self.format.prompt == "conversation":
            turns = [("user", question), ("assistant", answer)]
            text = self._rendered(turns)
            return text if text.endswith(self.format.lead) else text + self.format.lead
        marker = delimiter(self.format.sha256, question, answer)[:_MARKER]
        item = filled(texts["item"], {**places, "marker": marker})
        if self._takes_system:
            return self._rendered([("system", texts["system"]), ("user", item)])
        return self._rendered([("user", f"{texts['system']}\n{item}")])

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the chat template has a place for a system prompt."""
        from abliterator.model import render_messages

        try:
            render_messages(self._tokenizer, _messages([("system", "A."), ("user", "B.")]))
        except UnsupportedModel:
            return False
        return True

    def _rendered(self, turns: Sequence[tuple[str, str]]) -> str:
        from abliterator.model import render_messages

        if self._tokenizer.chat_template is None:
            raise JudgeError(
                f"The judge {self.name} has no chat template, which the format "
                f"`{self.format.name}` needs. Take an instruct model, or name the format that it "
                "was trained for (`judge.format`)."
            )
        return render_messages(self._tokenizer, _messages(turns), template_kwargs=_PLAIN)


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _begins(one: Tokens, other: Tokens) -> bool:
    return other[: len(one)] == one
