"""A probe of a server before anything is waited for: the model's name, its tokens, its form."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from abliterator.engines._completions import FORMS, CompletionClient, Form, require_same_length
from abliterator.errors import ServerError
from abliterator.recipe import EngineSettings, ServerSettings
from abliterator.record import EngineIdentity
from abliterator.server import (
    CompletionRequest,
    NoReply,
    Reply,
    Session,
    outside_a_loop,
    without_folder,
)

PROBED = 8  # tokens of the answer that is compared
_SHOWN = 5  # names of served models in a message
# Where servers say their version: vLLM, llama.cpp, SGLang.
_VERSIONS = (("version", "version"), ("props", "build_info"), ("get_server_info", "version"))


class Probed(NamedTuple):
    """What a server says of itself and of one of its models.

    Attributes:
        base_url: its address.
        model: the name under which it serves the model.
        form: in which it is asked.
        owner: name of the server's software as it states it, such as "vllm".
        version: of that software.
        dtype: of computation or storage, where it states one.
        root: what it serves under the name, where it states that: a Hub id, or the folder's path.
        tokens: the first tokens of its answer to the prompt.
    """

    base_url: str
    model: str
    form: Form
    owner: str | None
    version: str | None
    dtype: str | None
    root: str | None
    tokens: tuple[int, ...]

    def identity(self, settings: EngineSettings) -> EngineIdentity:
        """The same, for a record, with what the recipe's section adds."""
        is_vllm = settings.kind == "vllm"
        stated = settings.dtype if is_vllm and settings.dtype != "auto" else None
        return EngineIdentity(
            kind=settings.kind,
            software=self.owner,
            version=self.version,
            dtype=self.dtype or stated,
            model=without_folder(self.model),
            base_url=None if is_vllm else self.base_url,  # another port at every start
            requests=self.form.name,
        )


def probe(
    client: CompletionClient,
    model: str,
    prompt: Sequence[int],
    *,
    tokens: int,
    stop_ids: Sequence[int],
) -> Probed:
    """Checks that a server serves the expected model, and finds the form of its requests.

    Args:
        client: of the server.
        model: name under which it should serve the model.
        prompt: token ids of the longest prompt.
        tokens: of an answer, which must fit its context with the prompt.
        stop_ids: tokens that end an answer.

    Raises:
        ServerError: if the server cannot be reached, serves no model of that name, encodes text to
            other tokens, answers as another model, or has too short a context.
    """
    return outside_a_loop(lambda: asyncio.run(_probe(client, model, prompt, tokens, stop_ids)))


def require_two_models(base: Probed, edited: Probed) -> None:
    """Raises ServerError for a server that serves the same weights under both names."""
    same_server = base.base_url == edited.base_url
    if same_server and base.root is not None and base.root == edited.root:
        raise ServerError(
            f"The server {base.base_url} serves one model, {base.root}, under the names of both "
            f"sides, `{base.model}` and `{edited.model}`. Serve the edited checkpoint under "
            "`engine.edited`, from a second server (`engine.edited_url`) if need be."
        )


async def _probe(
    client: CompletionClient,
    model: str,
    prompt: Sequence[int],
    tokens: int,
    stop_ids: Sequence[int],
) -> Probed:
    settings = client.settings.model_copy(update={"model": model})
    # its replies are of this moment: no cache
    with tempfile.TemporaryDirectory(prefix="abliterator-") as folder:
        async with Session(settings, cache=Path(folder) / "probe.sqlite") as session:
            entry = await _served(session, settings)
            _require_context(settings, entry, len(prompt) + tokens)
            await _require_same_tokens(session, client, settings, prompt)
            first = min(PROBED, tokens)
            form, reply = await _first_form(session, client, settings, prompt, first, stop_ids)
            _require_same_model(settings, entry, reply)
            require_same_length(settings, prompt, reply)
            row = tuple(client.row(form, reply))
            _require_same_text(client, settings, row, reply)
            meta = entry.get("meta")
            return Probed(
                base_url=settings.base_url,
                model=model,
                form=form,
                owner=_text(entry.get("owned_by")),
                version=await _version(session, settings),
                dtype=_text(meta.get("ftype") if isinstance(meta, dict) else None),
                root=_text(entry.get("root")),
                tokens=row[:first],
            )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


async def _served(session: Session, settings: ServerSettings) -> Mapping[str, Any]:
    """The entry of /v1/models for the model."""
    from openai import APIError, APIStatusError

    try:
        listed = await session.json_of("/models")
        entries = [entry for entry in listed["data"] if isinstance(entry, dict)]
    except APIStatusError as error:
        status = error.status_code
        refused = status in (401, 403)
        raise ServerError(
            f"The server {settings.base_url} refused to list its models (status {status}). "
            + (
                f"Check the key: `engine.api_key_env` is {settings.api_key_env or 'not set'}."
                if refused
                else f"Check `{settings.url_key}`: with /v1 where the server needs it."
            )
        ) from None
    except (APIError, TimeoutError, LookupError, TypeError, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, ServerError):  # of a redirect to another server
            raise cause from None
        raise ServerError(
            f"No server with OpenAI's protocol answers at {settings.base_url} "
            f"({type(error).__name__}), from which `{settings.url_key}` expects answers. Start it, "
            f"for example with `vllm serve FOLDER --served-model-name {settings.model}`, and give "
            "the same command again: what is done is kept."
        ) from None
    for entry in entries:
        if settings.model in _names(entry):
            return entry
    names = [str(entry.get("id")) for entry in entries]
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN]) + (", ..." * (len(names) > _SHOWN))
    side = settings.model_key.rpartition(".")[2]
    raise ServerError(
        f"The server {settings.base_url} serves {shown or 'no model'}, not `{settings.model}`, "
        f"under which the {side} model is expected (`{settings.model_key}`). Serve it under that "
        f"name, for example with `vllm serve FOLDER --served-model-name {settings.model}`, or set "
        f"`{settings.model_key}` to its name; what is done is kept."
    )


def _names(entry: Mapping[str, Any]) -> Iterator[str]:
    aliases = entry.get("aliases")
    yield str(entry.get("id"))
    yield from map(str, aliases if isinstance(aliases, list) else ())


def _require_context(settings: ServerSettings, entry: Mapping[str, Any], tokens: int) -> None:
    meta = entry.get("meta")
    limits = (entry.get("max_model_len"), meta.get("n_ctx") if isinstance(meta, dict) else None)
    context = next((limit for limit in limits if isinstance(limit, int)), None)
    if context is not None and context < tokens:
        raise ServerError(
            f"The server {settings.base_url} reads at most {context} tokens, and the longest "
            f"prompt with its answer has {tokens}. Start it with a longer context (vLLM: "
            "`--max-model-len`, llama.cpp: `-c`), or set a smaller `max_new_tokens`."
        )


async def _require_same_tokens(
    session: Session, client: CompletionClient, settings: ServerSettings, prompt: Sequence[int]
) -> None:
    """Compares the tokens of the prompt's text, where the server encodes text on request."""
    from openai import APIError

    text = client.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
    of_llama_cpp = {"content": text, "add_special": False, "parse_special": True}
    body = {"model": settings.model, "prompt": text, "add_special_tokens": False, **of_llama_cpp}
    ids = None
    with suppress(APIError, TimeoutError, LookupError, TypeError, ValueError):
        ids = (await session.json_of(f"{_root(settings)}/tokenize", body))["tokens"]
    expected = client.tokenizer.encode(text, add_special_tokens=False)
    if isinstance(ids, list) and ids != expected:
        place = next(
            (i for i, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]),
            min(len(ids), len(expected)),
        )
        raise ServerError(
            f"The server {settings.base_url} encodes a prompt to {len(ids)} tokens, and the "
            f"tokenizer of this model to {len(expected)}; they differ from token {place} on "
            f"({ids[place : place + 3]}, expected {expected[place : place + 3]}). It serves "
            f"another model or tokenizer under the name `{settings.model}`: check "
            f"`{settings.model_key}`."
        )


async def _first_form(
    session: Session,
    client: CompletionClient,
    settings: ServerSettings,
    prompt: Sequence[int],
    tokens: int,
    stop_ids: Sequence[int],
) -> tuple[Form, Reply]:
    """The most exact form that the server understands, and its reply."""
    refusal = ""
    for form in FORMS:
        request = client.request(form, prompt, "", max_new_tokens=tokens, stop_ids=stop_ids)
        try:
            reply = await session.reply(_of_one_probe(request))
        except NoReply as error:
            if not error.refused:
                raise ServerError(
                    f"The server {settings.base_url} did not answer a prompt of {len(prompt)} "
                    f"tokens ({error}). Check that it runs and serves `{settings.model}`."
                ) from None
            refusal = str(error)
            continue
        if not form.ids_out or reply.token_ids is not None:
            return form, reply
    raise ServerError(
        f"The server {settings.base_url} {refusal}, in every form of a request to /v1/completions. "
        f"Check `{settings.url_key}` and `engine.parameters`, or use vLLM, SGLang or llama.cpp."
    )


def _of_one_probe(request: CompletionRequest) -> CompletionRequest:
    return request._replace(identity="probe")


def _require_same_model(settings: ServerSettings, entry: Mapping[str, Any], reply: Reply) -> None:
    names = {without_folder(name) for name in (settings.model, *_names(entry))}
    if reply.model is not None and without_folder(reply.model) not in names:
        raise ServerError(
            f"The server {settings.base_url} was asked for `{settings.model}` and answers as "
            f"`{reply.model}`. Check `{settings.model_key}` and what it serves."
        )


def _require_same_text(
    client: CompletionClient, settings: ServerSettings, row: Sequence[int], reply: Reply
) -> None:
    """Compares the text of an answer with its tokens, decoded by the base's tokenizer."""

    def plain(text: str) -> str:
        return re.sub(r"\s|\ufffd", "", text)

    if reply.token_ids is None:
        return
    # with special tokens or without, and without the stop token: servers differ
    texts = [client.tokenizer.decode(row, skip_special_tokens=skipped) for skipped in (True, False)]
    if not any(plain(text).startswith(plain(reply.text)) for text in texts):
        raise ServerError(
            f"The server {settings.base_url} answers with the tokens {list(row)}, which are the "
            f"text {texts[0]!r} here and {reply.text!r} there. It serves "
            f"another model or tokenizer under the name `{settings.model}`: check "
            f"`{settings.model_key}`."
        )


async def _version(session: Session, settings: ServerSettings) -> str | None:
    from openai import APIError

    for path, field in _VERSIONS:
        with suppress(APIError, TimeoutError, LookupError, TypeError, ValueError):
            value = (await session.json_of(f"{_root(settings)}/{path}"))[field]
            if isinstance(value, str):
                return value
    return None


def _root(settings: ServerSettings) -> str:
    """The server's address without /v1, where it answers what is not of OpenAI's protocol."""
    return settings.base_url.removesuffix("/v1")
