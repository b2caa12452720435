"""The base measured once, and every edit of it on the same prompts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from abliterator.divergence import answer_path, compare_logits, path_divergence, write_logits
from abliterator.generation import as_completions, generate, stop_ids
from abliterator.judge import judge_completions, summarise
from abliterator.record import Divergence, Side, Verdict
from abliterator.study._types import Row, Subject

Step = Callable[[str], None]


class Measured(NamedTuple):
    """One edit: the verdict on every target prompt, and the divergence on neutral ones."""

    verdicts: list[Verdict]
    divergence: Divergence | None


class Bench:
    """Measures edits of one loaded model; a context, which holds the base's logits in a file."""

    def __init__(self, subject: Subject, scratch: Path, on_step: Step = lambda what: None) -> None:
        """Takes what is measured, a file for the base's logits, and who hears of each step."""
        self.subject, self._scratch, self._on_step = subject, scratch, on_step

    def __enter__(self) -> Bench:
        """Measures the base."""
        subject = self.subject
        self.base = self._verdicts("base")
        answers = generate(
            subject.loaded,
            subject.neutral.token_ids,
            max_new_tokens=subject.kl_tokens,
            batch_size=subject.batch_size,
            stop_ids=stop_ids(subject.loaded),
        )
        self._paths = [
            answer_path(
                prompt,
                answer.token_ids,
                tokens=subject.kl_tokens,
                stopped=answer.finish_reason == "stop",
            )
            for prompt, answer in zip(subject.neutral.token_ids, answers, strict=True)
        ]
        write_logits(
            subject.loaded, self._paths, self._scratch, max_batch_tokens=subject.max_batch_tokens
        )
        self._on_step("base")
        return self

    def __exit__(self, *_: object) -> None:
        """Deletes the base's logits."""
        self._scratch.unlink(missing_ok=True)

    def measure(self, name: str, edit: AbstractContextManager[None]) -> Measured:
        """The model while `edit` is in force."""
        subject = self.subject
        with edit:
            verdicts = self._verdicts("edited")
            found = compare_logits(
                subject.loaded,
                self._paths,
                self._scratch,
                max_batch_tokens=subject.max_batch_tokens,
            )
        self._on_step(name)
        return Measured(
            verdicts, path_divergence(found, tokens=subject.kl_tokens, seed=subject.seed)
        )

    def row(self, name: str, measured: Measured, **what: Any) -> Row:
        """An edit as a row, with what it differs from the base."""
        behaviour = summarise(self.base, measured.verdicts, seed=self.subject.seed)
        return Row(
            name=name,
            answers=behaviour.edited,
            delta=behaviour.delta,
            divergence=measured.divergence,
            **what,
        )

    def base_row(self) -> Row:
        """The base itself."""
        behaviour = summarise(self.base, self.base, seed=self.subject.seed)
        return Row(name="base", answers=behaviour.base)

    def _verdicts(self, side: Side) -> list[Verdict]:
        subject = self.subject
        answers = generate(
            subject.loaded,
            subject.target.token_ids,
            max_new_tokens=subject.max_new_tokens,
            batch_size=subject.batch_size,
            stop_ids=stop_ids(subject.loaded),
        )
        completions = as_completions(answers, subject.target.prompts, set_name="target", side=side)
        return judge_completions(completions, subject.judge)
