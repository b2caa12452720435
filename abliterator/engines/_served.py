"""An engine whose answers come from a server, and all else from an engine that is built late.

So rollouts of a model that a server holds load no weights here.

    engine = ServedEngine(folder, tokenizer, ServedByName(client, "base", digest), load)
    engine.answers(prompts, max_new_tokens=64, batch_size=16)  # no weights are loaded
    engine.logits(paths, max_batch_tokens=4096)  # calls `load`
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from abliterator.anatomy import anatomy_of
from abliterator.checkpoint import Checkpoint
from abliterator.engines._completions import CompletionClient, Form
from abliterator.engines._edits import Edit
from abliterator.engines._generate import declared_stop_ids, require_tokens
from abliterator.engines._probe import Probed, probe
from abliterator.engines._protocol import (
    Answer,
    AnswerPath,
    Engine,
    OnBatch,
    Padding,
    SideBySide,
    Tokens,
)
from abliterator.engines._sampling import Sampling
from abliterator.model import Limits, read_config, require_fit, stored_limits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


class ServedModel(NamedTuple):
    """A model that a server serves.

    Attributes:
        client: of the server.
        name: under which it serves the model.
        identity: digest of the model's files, or of the edit, with all else that answers depend on
            beside the request.
        form: in which the server is asked; None where it has not been probed yet.
    """

    client: CompletionClient
    name: str
    identity: str
    form: Form | None = None


class Served(Protocol):
    """What serves a model, and perhaps edits of it."""

    def model(self) -> ServedModel:
        """The model without an edit."""

    def expect(self, edits: Sequence[Edit]) -> None:
        """Prepares edits that are served next, one after another."""

    def under(self, edit: Edit) -> AbstractContextManager[ServedModel | None]:
        """The model under an edit, while the context is open; None if no server can serve it."""


@dataclass(frozen=True)
class ServedByName:
    """One model of a running server, which can serve no edits of it."""

    client: CompletionClient
    name: str
    identity: str

    def model(self) -> ServedModel:
        """The model without an edit."""
        return ServedModel(self.client, self.name, self.identity)

    def expect(self, edits: Sequence[Edit]) -> None:
        """Prepares nothing."""

    def under(self, edit: Edit) -> AbstractContextManager[ServedModel | None]:
        """None: a server has the weights that it was started with."""
        return nullcontext(None)


@dataclass
class _OpenEdit:
    """An edit in force: what serves it, and what it holds in the engine of passes, if anything."""

    edit: Edit
    model: ServedModel | None
    passes: ExitStack
    is_entered: bool = False


@dataclass
class ServedEngine:
    """Answers of a server, and passes of another engine, as an `Engine`.

    Attributes:
        folder: the model's files; its config is read, its weights are not.
        tokenizer: of the model, or of the base whose prompts it is given.
        served: what serves the model.
        passes: returns the engine of everything but answers; called when that is first needed,
            and each time, so that who holds the weights may free them between two calls.
        trust_remote_code: whether Python files of the folder may run.
        note: shows a line to the user.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    served: Served
    passes: Callable[[], Engine]
    trust_remote_code: bool = False
    note: Callable[[str], None] = lambda line: None
    _edits: list[_OpenEdit] = field(default_factory=list)
    _probed: dict[str, Probed] = field(default_factory=dict)
    _is_noted: bool = False

    @cached_property
    def limits(self) -> Limits:
        """Context length and vocabulary of the model, as its config states them."""
        return stored_limits(self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def stop_ids(self) -> Tokens:
        """Token ids that end an answer: those that the loaded model would have."""
        generation_config = _generation_config(self.folder, self._config)
        return declared_stop_ids(generation_config, self._config, self.tokenizer)

    @cached_property
    def hidden_shape(self) -> tuple[int, int]:
        """(n_layers, d_model)."""
        anatomy = anatomy_of(Checkpoint.open(self.folder).config)
        return anatomy.n_layers, self._config.get_text_config().hidden_size

    @cached_property
    def _config(self) -> PreTrainedConfig:
        return read_config(self.folder, self.trust_remote_code)

    def probed(self, prompt: Sequence[int], *, max_new_tokens: int) -> Probed:
        """What the server says of itself and of the unedited model, after checking both.

        Args:
            prompt: token ids of the longest prompt.
            max_new_tokens: of its answer.

        Raises:
            ServerError: if it serves another model, or cannot be used.
        """
        return self._probe(self.served.model(), prompt, max_new_tokens)

    def _probe(self, model: ServedModel, prompt: Sequence[int], max_new_tokens: int) -> Probed:
        if model.name not in self._probed:
            self._probed[model.name] = probe(
                model.client, model.name, prompt, tokens=max_new_tokens, stop_ids=self.stop_ids
            )
        return self._probed[model.name]

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        batch_size: int | None = None,
        stop_ids: Sequence[int] | None = None,
        share_prefix: bool = False,
        sampling: Sampling | None = None,
        answered: MutableMapping[int, Answer] | None = None,
        on_batch: OnBatch | None = None,
    ) -> list[Answer]:
        """Answers, one a prompt; of an edit that no server can serve, from the passes."""
        model = self._edits[-1].model if self._edits else self.served.model()
        stop_ids = self.stop_ids if stop_ids is None else stop_ids
        if model is None:
            self._note_fallback()
            return self._passes().answers(
                prompts,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                stop_ids=stop_ids,
                share_prefix=share_prefix,
                sampling=sampling,
                answered=answered,
                on_batch=on_batch,
            )
        answers: MutableMapping[int, Answer] = {} if answered is None else answered
        missing = [i for i in range(len(prompts)) if i not in answers]
        served = self._served_answers(
            model,
            [prompts[i] for i in missing],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
            on_batch=on_batch,
        )
        answers.update(zip(missing, served, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def _served_answers(
        self,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampling: Sampling | None = None,
        on_batch: OnBatch | None = None,
    ) -> list[Answer]:
        if not prompts:
            return []
        require_tokens(prompts)
        require_fit(self.limits, prompts, max_new_tokens=max_new_tokens)
        longest = max(prompts, key=len)
        form = model.form or self._probe(model, longest, max_new_tokens).form
        return model.client.answers(
            model.name,
            prompts,
            form=form,
            identity=model.identity,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
            on_batch=on_batch,
        )

    def _note_fallback(self) -> None:
        if not self._is_noted:
            self._is_noted = True
            self.note(
                "Answers under an edit come from this process: the server has the weights that it "
                "was started with."
            )

    def hidden_states(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        positions: Sequence[int] = (-1,),
        padding: Padding = "none",
        max_batch_tokens: int = 4096,
        share_prefix: bool = False,
        skipped: Collection[int] = (),
    ) -> Iterator[tuple[list[int], Tensor]]:
        """The residual stream of every prompt at some positions of every layer."""
        return self._passes().hidden_states(
            prompts,
            positions=positions,
            padding=padding,
            max_batch_tokens=max_batch_tokens,
            share_prefix=share_prefix,
            skipped=skipped,
        )

    def logits(
        self,
        paths: Sequence[AnswerPath],
        *,
        max_batch_tokens: int,
        share_prefix: bool = False,
        on_batch: OnBatch | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Next-token logits along given answers."""
        return self._passes().logits(
            paths,
            max_batch_tokens=max_batch_tokens,
            share_prefix=share_prefix,
            on_batch=on_batch,
        )

    def log_likelihoods(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Tokens],
        *,
        max_batch_tokens: int,
        together: bool = False,
    ) -> Tensor:
        """[N, C] log-probabilities of each continuation after each prompt."""
        return self._passes().log_likelihoods(
            prompts, continuations, max_batch_tokens=max_batch_tokens, together=together
        )

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """The model under an edit, as long as the context is open."""
        with self.served.under(edit) as model, ExitStack() as passes:
            # a server serves an edit of the base, not an edit of an edit
            self._edits.append(_OpenEdit(edit, None if self._edits else model, passes))
            try:
                yield
            finally:
                self._edits.pop()

    @contextmanager
    def edited_side_by_side(
        self, edits: Sequence[Edit], *, max_batch_tokens: int
    ) -> Iterator[SideBySide]:
        """The model under several edits of one kind at once."""
        with ExitStack() as stack:

            def passes() -> SideBySide:
                return stack.enter_context(
                    self._passes().edited_side_by_side(edits, max_batch_tokens=max_batch_tokens)
                )

            yield _ServedSideBySide(self, edits, passes)

    def _passes(self) -> Engine:
        """The engine of passes, under the edits that are in force."""
        engine = self.passes()
        for entry in self._edits:
            if not entry.is_entered:
                entry.passes.enter_context(engine.edited(entry.edit))
                entry.is_entered = True
        return engine


@dataclass
class _ServedSideBySide:
    """Several edits at once: answers of a server that can serve them all, else of the passes."""

    engine: ServedEngine
    edits: Sequence[Edit]
    open_passes: Callable[[], SideBySide]

    @property
    def n(self) -> int:
        """How many edits there are."""
        return len(self.edits)

    @cached_property
    def _passes(self) -> SideBySide:
        return self.open_passes()

    def answers(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int | None
    ) -> list[list[Answer]]:
        """Greedy answers to `prompts`, for each edit."""
        engine, served = self.engine, []
        engine.served.expect(self.edits)
        for edit in self.edits:
            with engine.served.under(edit) as model:
                if model is None:
                    engine._note_fallback()
                    return self._passes.answers(
                        prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
                    )
                served.append(
                    engine._served_answers(
                        model, prompts, max_new_tokens=max_new_tokens, stop_ids=engine.stop_ids
                    )
                )
        return served

    def logits(self, paths: Sequence[AnswerPath]) -> Iterator[tuple[int, int, Tensor]]:
        """Logits along given answers: edit, index of the path, [positions, V] on the CPU."""
        return self._passes.logits(paths)

    def log_likelihoods(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Tokens]
    ) -> Tensor:
        """[n, N, C] float64 log-probabilities of each continuation after each prompt, nats."""
        return self._passes.log_likelihoods(prompts, continuations)


def _generation_config(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """The generation config that a loaded model of the folder has."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(config)
