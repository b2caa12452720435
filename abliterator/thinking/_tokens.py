"""Splits generated tokens into thinking and answer."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from abliterator.thinking._formats import formats
from abliterator.thinking._split import Opened, Split, split_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAIL = 96  # tokens of a prompt in which its template can have begun the reply
ANSWER = "content"  # the field of a response template that is the answer
NO_THINKING = {ANSWER, "tool_calls"}  # its fields that may be all there are
# The role that a template writes between the token that begins a reply and the thinking.
_ROLE = re.compile(r"\s*\w*:?\s*")


class Splitter:
    """Splits replies into thinking and answer, while they still have their control tokens.

    By the tokenizer's response template where it has one, and by the table of formats.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def split(self, prompt: Sequence[int], reply: Sequence[int], *, is_cut: bool) -> Split:
        """Splits generated tokens into thinking and answer.

        Args:
            prompt: token ids of the rendered prompt, in which the template may have begun the
                thinking.
            reply: token ids that were generated, without the stop token.
            is_cut: whether the reply ended at a limit of tokens.

        Returns:
            The thinking with its control tokens, and the answer without any. A reply without
            thinking is all answer, decoded as a whole.
        """
        text, control = self._decoded(reply), self._control_in(reply)
        thinking, rest, opened = "", text, self.opened_by(prompt)
        if (parsed := self._parsed(prompt, text, is_cut=is_cut)) is not None:
            thinking, rest = parsed
            if not rest.strip():
                return Split(text, "")
            if self._knows_thinking:
                opened = Opened(is_closed=True)
        split = split_text(rest, opened=opened, control=control, is_cut=is_cut)
        if not (thinking or split.thinking):
            plain = self._tokenizer.decode(list(reply), skip_special_tokens=True)
            return Split("", str(plain))
        answer = split.answer
        for token in control:
            answer = answer.replace(token, "")
        return Split(thinking + split.thinking, answer)

    def first_token(self, reply: Sequence[int], split: Split) -> int:
        """Index of the first token of the answer; the reply's length where there is no answer.

        The first token with a word of the answer: line breaks after the thinking are part of
        neither. Where an answer has thinking within it, its last part counts.
        """

        def text_from(start: int) -> str:
            return str(self._tokenizer.decode(list(reply[start:]), skip_special_tokens=True))

        answer, text = split.answer.strip(), text_from(0)
        while answer not in text:
            answer = answer[1:].lstrip()
        if not answer:
            return len(reply)
        # the later the start, the less text is left: the last start that leaves all of the answer
        starts = range(len(reply))
        return bisect_left(starts, True, key=lambda start: answer not in text_from(start)) - 1

    def opened_by(self, prompt: Sequence[int]) -> Opened:
        """The thinking block or channel that a rendered prompt opened for the reply.

        Text of the user opens nothing, since the template begins the reply after it. A mark opens a
        thought if it ends the prompt, or if it begins the reply and is followed only by words of
        the template.
        """
        text = self._decoded(prompt[-TAIL:])
        for channels in formats().channels:
            headers = list(channels.header.finditer(text))
            if (
                headers
                and headers[-1]["channel"]
                and not self._has_added(text[headers[-1].end() :])
            ):
                return Opened(channels.control, headers[-1]["channel"])
        marks = list(formats().marks(text))
        if not marks:
            return Opened()
        mark, after = marks[-1], text[marks[-1].end :]
        if not mark.opens:
            # a paired mark alone may be what any prompt has
            closes = not mark.paired or any(m.opens and m.block == mark.block for m in marks)
            return Opened(is_closed=closes and not after.strip())
        if after.strip() and not self._begins_a_reply(text[: mark.start], after):
            return Opened()
        return Opened(mark.block)

    def _begins_a_reply(self, before: str, after: str) -> bool:
        """Whether a mark begins a reply, and no other turn begins after it."""
        ends = [before.rfind(token) + len(token) for token in self._added if token in before]
        is_first = _ROLE.fullmatch(before[max(ends, default=0) :]) is not None
        return is_first and not self._has_added(after)

    def _has_added(self, text: str) -> bool:
        return any(token in text for token in self._added)

    def _parsed(self, prompt: Sequence[int], reply: str, *, is_cut: bool) -> tuple[str, str] | None:
        """(thinking, answer) by the response template.

        None where there is none that works: the table of formats remains.
        """
        if not self._template:
            return None
        try:
            from transformers.utils.chat_parsing import ResponseParser

            parser = ResponseParser(self._template, prefix=self._decoded(prompt))
            events = parser.feed(reply)
            if not is_cut:  # `feed` holds back what may be the beginning of a mark
                events += parser.finalize()[1]
        except Exception:  # noqa: BLE001  whatever a folder holds in its place
            return None
        chunks = [(e["field"], e["text"]) for e in events if e["type"] == "region_chunk"]
        thinking = "".join(text for field, text in chunks if field != ANSWER)
        return thinking, "".join(text for field, text in chunks if field == ANSWER)

    @cached_property
    def _template(self) -> dict[str, object] | None:
        template = getattr(self._tokenizer, "response_template", None)
        fields = template.get("fields") if isinstance(template, dict) else None
        return template if isinstance(fields, dict) and ANSWER in fields else None

    @property
    def _knows_thinking(self) -> bool:
        fields = (self._template or {}).get("fields")
        return isinstance(fields, dict) and bool(fields.keys() - NO_THINKING)

    @cached_property
    def _added(self) -> list[str]:
        """Added tokens, which templates use, beside those of ordinary text."""
        added = (token.content for token in self._tokenizer.added_tokens_decoder.values())
        return [token for token in added if token.strip(" \n\t▁")]

    @cached_property
    def _control(self) -> dict[int, str]:
        """Tokens that are dropped from text."""
        added = self._tokenizer.added_tokens_decoder
        special_ids = self._tokenizer.all_special_ids
        texts = {i: str(self._tokenizer.convert_ids_to_tokens(i)) for i in special_ids}
        return texts | {i: token.content for i, token in added.items() if token.special}

    def _control_in(self, tokens: Sequence[int]) -> set[str]:
        return {self._control[token] for token in set(tokens) & self._control.keys()}

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))
