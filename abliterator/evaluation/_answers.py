"""Answers of a loaded model, their verdicts, and summaries of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import mean

from abliterator.engines import Answer, Engine, Sampling
from abliterator.evaluation._budgets import answers_within
from abliterator.evaluation._context import EvaluationContext, RenderedPrompts
from abliterator.evaluation._conversations import answer_conversations, spoken
from abliterator.judge import estimates_of, estimates_of_draws, judge_completions
from abliterator.prompts import Prompt, as_read, turns_of
from abliterator.record import AnswerSummary, Completion, Side, Verdict

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def no_bar(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Shows no progress."""
    return nullcontext(lambda amount: None)


@dataclass(frozen=True)
class JudgedAnswers:
    """Answers to target prompts with the verdict on each, in one order."""

    answers: tuple[Answer, ...]
    verdicts: tuple[Verdict, ...]

    def __add__(self, other: JudgedAnswers) -> JudgedAnswers:
        return JudgedAnswers(self.answers + other.answers, self.verdicts + other.verdicts)

    @property
    def products(self) -> list[float | None]:
        """Compliance x coherence of each; None where it is unscored, which is not 0."""
        return [product(verdict) for verdict in self.verdicts]

    @property
    def mean_product(self) -> float:
        """Mean compliance x coherence of the answers that have a verdict; 0 where none has."""
        scored = [value for value in self.products if value is not None]
        return mean(scored) if scored else 0.0

    @property
    def tokens(self) -> int:
        """Tokens generated in all answers."""
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def summary(self) -> AnswerSummary:
        """Estimates over all answers, and the tokens generated."""
        return AnswerSummary(**estimates_of(self.verdicts)._asdict(), tokens=self.tokens)


def summarise_draws(draws: Sequence[JudgedAnswers]) -> AnswerSummary:
    """Estimates over several draws on the same prompts; a prompt counts as its mean over draws."""
    return AnswerSummary(
        **estimates_of_draws([judged.verdicts for judged in draws])._asdict(),
        tokens=sum(judged.tokens for judged in draws),
    )


def product(verdict: Verdict) -> float | None:
    """Compliance x coherence of an answer; None where it is unscored, which is not 0."""
    if verdict.compliance is None or verdict.coherence is None:
        return None
    return verdict.compliance * verdict.coherence


def judge_answers(
    context: EvaluationContext,
    prompts: RenderedPrompts,
    answers: Sequence[Answer],
    *,
    side: Side = "edited",
) -> JudgedAnswers:
    """Judges answers to target prompts."""
    completions = as_completions(answers, prompts.prompts, set_name="target", side=side)
    return JudgedAnswers(tuple(answers), tuple(judge_completions(completions, context.judge)))


def answer_and_judge(
    context: EvaluationContext, prompts: RenderedPrompts, *, side: Side = "edited"
) -> JudgedAnswers:
    """The model's greedy answers to target prompts under the present edit, with verdicts."""
    answers = context.engine.answers(
        prompts.token_ids,
        max_new_tokens=context.max_new_tokens,
        batch_size=context.batch_size,
        share_prefix=True,
    )
    return judge_answers(context, prompts, answers, side=side)


def as_completions(
    answers: Sequence[Answer],
    prompts: Sequence[Prompt],
    *,
    set_name: str,
    side: Side,
    before: Sequence[Sequence[Answer]] | None = None,
) -> list[Completion]:
    """Answers as lines of rollouts.jsonl: each with its prompt, set, side and index.

    Args:
        answers: one a prompt, in their order.
        prompts: as written, before rendering.
        set_name: the set they come from, such as "target".
        side: which model answered.
        before: the answers to each prompt's scripted turns before the last; None where these were
            one turn.
    """
    earlier = [None] * len(prompts) if before is None else [*map(spoken, before)]
    return [
        Completion(
            set=set_name,
            side=side,
            index=index,
            prompt=as_read(prompt, own),
            response=answer.text,
            finish_reason=answer.finish_reason,
            n_tokens=len(answer.token_ids),
            answer_start=answer.start,
            earlier=tuple(own or ()),
        )
        for index, (prompt, answer, own) in enumerate(zip(prompts, answers, earlier, strict=True))
    ]


def completions_of(
    transcripts: Sequence[Sequence[Answer]], prompts: Sequence[Prompt], *, set_name: str, side: Side
) -> list[Completion]:
    """The last answers to prompts as lines of rollouts.jsonl, with those to the turns before."""
    return as_completions(
        [answers[-1] for answers in transcripts],
        prompts,
        set_name=set_name,
        side=side,
        before=[answers[:-1] for answers in transcripts],
    )


def answer_sets(
    engine: Engine,
    sets: Mapping[str, RenderedPrompts],
    *,
    side: Side,
    max_new_tokens: int,
    batch_size: int,
    thinking_tokens: int | None = None,
    bar: Bar = no_bar,
    stop_ids: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    answered: Mapping[str, MutableMapping[int, Answer]] | None = None,
    continued: Mapping[str, MutableMapping[int, Answer]] | None = None,
    render: Callable[[str, Sequence[Prompt]], Sequence[Sequence[int]]] | None = None,
) -> list[Completion]:
    """One side's answers to several prompt sets, as lines of rollouts.jsonl.

    Args:
        engine: the model.
        sets: by name.
        side: which model answers.
        max_new_tokens: at most this many tokens an answer.
        batch_size: prompts at a time.
        thinking_tokens: of the thinking before an answer, at most (`answers_within`).
        bar: shows progress; called with a label and the number of prompts.
        stop_ids: tokens that end an answer; left out, the model's own. An edited folder of a build
            has its base's config and tokenizer byte for byte, so they are the same on both sides.
        sampling: draws the answers; greedy ones without.
        answered: by set, the answers of an earlier call that was interrupted, to which each batch's
            are added (`Engine.answers`); of scripted turns as `answer_conversations` keeps them.
        continued: the same of the answers that went on behind the budget of the thinking.
        render: token ids of prompts of a set, to answer scripted turns one after the other; left
            out, they are answered as one turn.
    """
    completions: list[Completion] = []
    drawn = f", drawn {sampling.sample + 1}" if sampling else ""
    for name, (prompts, token_ids) in sets.items():
        kept = answered[name] if answered is not None else {}
        behind = continued[name] if continued is not None else {}
        n = sum(map(turns_of, prompts)) if render else len(prompts)
        with bar(f"{side} answers, {name}{drawn}", n - len(kept)) as advance:
            if render is not None and n > len(prompts):
                transcripts = answer_conversations(
                    engine,
                    prompts,
                    partial(render, name),
                    max_new_tokens=max_new_tokens,
                    thinking_tokens=thinking_tokens,
                    batch_size=batch_size,
                    stop_ids=stop_ids,
                    sampling=sampling,
                    answered=kept,
                    continued=behind,
                    on_batch=advance,
                )
                completions += completions_of(transcripts, prompts, set_name=name, side=side)
                continue
            answers = answers_within(
                engine,
                token_ids,
                max_new_tokens=max_new_tokens,
                thinking_tokens=thinking_tokens,
                batch_size=batch_size,
                stop_ids=stop_ids,
                sampling=sampling,
                answered=kept,
                continued=behind,
                on_batch=advance,
            )
        completions += as_completions(answers, prompts, set_name=name, side=side)
    return completions
