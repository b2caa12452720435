"""Answers from a server with OpenAI's protocol, as token ids.

Prompts go as token ids and answers come back as token ids where the server can do that; else the
text is encoded again. What a killed run had in flight is all that the next one asks for again.

    client = CompletionClient(settings, tokenizer, cache=Path("work/answers.sqlite"))
    client.answers("base", prompts, identity=digest, max_new_tokens=64, stop_ids=stop_ids)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from abliterator.engines._generate import answer_of
from abliterator.engines._protocol import Answer, OnBatch
from abliterator.engines._sampling import Sampling
from abliterator.errors import ServerError
from abliterator.server import (
    CompletionRequest,
    NoReply,
    Reply,
    Session,
    in_parallel,
    outside_a_loop,
)
from abliterator.thinking import Splitter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from abliterator.recipe import ServerSettings

CUT = {"length", "max_tokens", "max_output_tokens", "model_length", "token_limit"}
ENDED = {"stop", "eos", "eos_token", "end_turn", "stop_sequence"}

STAGGER = 0.004  # seconds: about twice what one reply takes to be read

GREEDY = {"temperature": 0}
# A server may take penalties from the model's generation_config; transformers' answers have none.
UNPENALISED = {**GREEDY, "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0}


class Form(NamedTuple):
    """How a server is asked, and how its answers are read.

    Attributes:
        name: for the record.
        ids_in: whether prompts are token ids; else text that the server encodes.
        ids_out: whether token ids come back; else its text is encoded again.
        parameters: fields of the request's body.
    """

    name: str
    ids_in: bool
    ids_out: bool
    parameters: dict[str, Any]


FORMS = (
    # vLLM and SGLang
    Form("token ids", True, True, {**UNPENALISED, "return_token_ids": True}),
    # llama.cpp, and vLLM before 0.10.2
    Form(
        "token ids of log-probabilities",
        True,
        True,
        {**UNPENALISED, "logprobs": 1, "return_tokens_as_token_ids": True},
    ),
    Form("text, encoded again", True, False, {**UNPENALISED, "skip_special_tokens": False}),
    # transformers serve, and TGI
    Form("text of prompt and answer, encoded again", False, False, GREEDY),
)
"""The forms of a request, the most exact first."""


class CompletionClient:
    """Answers of the models that one server serves.

    Args:
        settings: the server; its `model` gives way to the name that a method is given.
        tokenizer: of the base; what is sent and read is in its token ids.
        cache: SQLite file of replies; the same file makes a run go on where it stopped.
        on_failure: called after each failed call, before it is tried again; may raise ServerError.
    """

    def __init__(
        self,
        settings: ServerSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        cache: Path,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.cache = cache
        self.on_failure = on_failure

    @cached_property
    def _splitter(self) -> Splitter:
        return Splitter(self.tokenizer)

    def answers(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        *,
        form: Form,
        identity: str,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampling: Sampling | None = None,
        on_batch: OnBatch | None = None,
    ) -> list[Answer]:
        """Answers of a served model, one a prompt.

        Args:
            model: name under which the server serves it.
            prompts: token ids; none may be empty.
            form: how the server is asked, as `probe` finds it.
            identity: of what is served, beside its name: a part of the cache's keys.
            max_new_tokens: at most this many tokens an answer.
            stop_ids: tokens that end an answer.
            sampling: draws the answers, by the server's own rules; greedy without.
            on_batch: called with 1 after each answer.

        Raises:
            ServerError: if the server cannot be used, refuses a prompt, reads other tokens than it
                was sent, or cuts an answer short. What was answered is kept.
        """
        settings = self.settings.model_copy(update={"model": model})
        requests = [
            self.request(
                form,
                prompt,
                identity,
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                sampling=sampling,
            )
            for prompt in prompts
        ]

        def read(index: int, reply: Reply) -> Answer:
            require_same_length(settings, prompts[index], reply)
            return self._answer(form, prompts[index], reply, max_new_tokens, stop_ids)

        return outside_a_loop(
            lambda: asyncio.run(
                _all(settings, self.cache, requests, read, on_batch, self.on_failure)
            )
        )

    def request(
        self,
        form: Form,
        prompt: Sequence[int],
        identity: str,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampling: Sampling | None = None,
    ) -> CompletionRequest:
        """The request for one answer.

        Raises:
            ServerError: if the form wants text, and no text is encoded to this prompt.
        """
        body = {
            **self.settings.parameters,
            "prompt": list(prompt) if form.ids_in else self._text_of(prompt),
            "max_tokens": max_new_tokens,
            **form.parameters,
        }
        if sampling is not None:
            body |= _drawn(form, sampling, prompt)
        if form.ids_in:
            body["stop_token_ids"] = list(stop_ids)
        return CompletionRequest(body, identity)

    def _text_of(self, prompt: Sequence[int]) -> str:
        """The text that the tokenizer encodes to a prompt, as a server would encode it."""
        text: str = self.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        for candidate in (text, text.removeprefix(self.tokenizer.bos_token or "")):
            if self.tokenizer(candidate)["input_ids"] == list(prompt):
                return candidate
        raise ServerError(
            f"The server {self.settings.base_url} takes prompts as text, and a prompt of "
            f"{len(prompt)} tokens is no text that the tokenizer encodes to the same tokens. Use a "
            "server that takes token ids, such as vLLM, SGLang or llama.cpp's."
        )

    def row(self, form: Form, reply: Reply) -> Sequence[int]:
        """Token ids of a reply; of a server that gives none, or not all, those of its text."""
        if form.ids_out:
            if reply.token_ids is None:
                raise self._unusable("gave no token ids, though it did when it was probed", reply)
            # llama.cpp lists no tokens that only begin a character of several, such as an emoji
            if "logprobs" not in form.parameters or len(reply.token_ids) >= reply.output_tokens:
                return reply.token_ids
        encoded: list[int] = self.tokenizer.encode(reply.text, add_special_tokens=False)
        return encoded

    def _answer(
        self,
        form: Form,
        prompt: Sequence[int],
        reply: Reply,
        max_new_tokens: int,
        stop_ids: Sequence[int],
    ) -> Answer:
        reason = (reply.finish_reason or "").strip().lower()
        row = self.row(form, reply)
        if reason not in CUT | ENDED:
            raise self._unusable(f"ended an answer with {reason or 'no reason'}", reply)
        # an answer encoded again may have fewer tokens than were generated
        is_exact = row is reply.token_ids
        generated = len(row) if is_exact else reply.output_tokens or max_new_tokens
        if reason in CUT and generated < max_new_tokens and not set(row) & set(stop_ids):
            raise self._unusable(
                f"cut an answer after {generated} of {max_new_tokens} tokens: its context is too "
                "short for the prompt. Start it with a longer one",
                reply,
            )
        return answer_of(
            self._splitter, prompt, row[:max_new_tokens], stop_ids, is_ended=reason in ENDED
        )

    def _unusable(self, what: str, reply: Reply) -> ServerError:
        name = reply.model or self.settings.model
        return ServerError(
            f"The server {self.settings.base_url} ({name}) {what}. What was answered is kept, and "
            "the same command goes on from there."
        )


def _drawn(form: Form, sampling: Sampling, prompt: Sequence[int]) -> dict[str, Any]:
    """Fields of a request for a drawn answer; its seed has 31 bits, which every server takes."""
    fields = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed_of(prompt) >> 32,
    }
    if "repetition_penalty" in form.parameters:  # such servers have defaults of their own for these
        fields |= {"top_k": -1, "min_p": 0.0}
    return fields


async def _all(
    settings: ServerSettings,
    cache: Path,
    requests: Sequence[CompletionRequest],
    read: Callable[[int, Reply], Answer],
    on_batch: OnBatch | None,
    on_failure: Callable[[], None],
) -> list[Answer]:
    async with Session(settings, cache=cache, on_failure=on_failure) as session:

        async def answered(index: int) -> Answer:
            try:
                reply = await session.reply(requests[index])
            except NoReply as error:
                raise ServerError(
                    f"The server {settings.base_url} gave no answer to prompt {index} ({error}). "
                    "What was answered is kept, and the same command goes on from there."
                ) from None
            answer = read(index, reply)
            if on_batch:
                on_batch(1)
            return answer

        answers = await in_parallel(
            range(len(requests)),
            answered,
            workers=min(settings.concurrency, len(requests)),
            stagger=STAGGER,
            at_limit=lambda limit, done: ServerError(
                f"Answering stopped: {limit}. {done} of {len(requests)} prompts are answered and "
                "kept; raise the limit, and the same command goes on from there."
            ),
        )
    return [answers[index] for index in range(len(requests))]


def require_same_length(settings: ServerSettings, prompt: Sequence[int], reply: Reply) -> None:
    """Raises ServerError if the server counts other tokens in a prompt than it was sent."""
    if reply.input_tokens not in (0, len(prompt)):
        raise ServerError(
            f"The server {settings.base_url} read {reply.input_tokens} tokens of a prompt of "
            f"{len(prompt)}, so that its answers would be to another prompt. Check that it serves "
            f"this model under the name `{settings.model}` (`{settings.model_key}`), and that it "
            "adds no token to prompts."
        )
