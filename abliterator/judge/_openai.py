"""An LLM judge behind an OpenAI-compatible server: votes, a share judged twice, resumption.

Identical answers to a prompt are judged once, blind to their side, in a seeded order. A
seeded share is judged once more, to measure how often the judge disagrees with itself.

    judge = OpenAIJudge(settings, cache=Path("work/judge.sqlite"))
    judge.judge_all([Answered("What is tea?", "A drink.")])
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low

from abliterator.errors import JudgeError
from abliterator.files import digest_of
from abliterator.judge._parse import SCHEMA, parse
from abliterator.judge._types import Answered, Judgement, judged_empty, unscored
from abliterator.recipe import JudgeSettings
from abliterator.record import Estimate, JudgeIdentity
from abliterator.server import (
    Prompt,
    Request,
    Session,
    Unanswered,
    Usage,
    delimiter,
    filled,
    in_parallel,
    load_prompt,
    neutralize,
    outside_a_loop,
)
from abliterator.statistics import rate_interval

Item = tuple[str, str]  # prompt and answer: all that a judge is shown


@dataclass
class Tally:
    """Progress of a judging run."""

    total: int
    done: int = 0
    unscored: int = 0
    rejudged: list[bool] = field(default_factory=list)  # whether the second verdict was another
    usage: Usage = field(default_factory=Usage)

    def __str__(self) -> str:
        return f"{self.unscored} unscored" + (f", {self.usage}" if self.usage.calls else "")


class OpenAIJudge:
    """A judge on a server; `identity` holds usage and disagreement once it has judged.

    Args:
        settings: the recipe's section.
        cache: SQLite file of its replies; the same file makes a run go on where it stopped.
        seed: of the order, and of the share that is judged twice.
        on_verdict: called with the tally after each answer.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        *,
        cache: Path,
        seed: int = 0,
        on_verdict: Callable[[Tally], None] | None = None,
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._seed = seed
        self._on_verdict = on_verdict
        self._tally = Tally(0)

    @property
    def identity(self) -> JudgeIdentity:
        """Model, prompt and settings; after judging also usage and what the server reports."""
        tally, settings, prompt = self._tally, self._settings, judge_prompt()
        usage = tally.usage
        usd = {} if settings.prices is None else {"usd": round(usage.cost, 6)}
        disagreement = Estimate.of(rate_interval(sum(tally.rejudged), len(tally.rejudged)))
        return JudgeIdentity(
            kind="openai",
            model=settings.model,
            prompt_sha256=prompt.sha256,
            version=prompt.version,
            base_url=settings.base_url,
            votes=settings.votes,
            served_model=_joined(usage.models),
            fingerprints=tuple(sorted(usage.fingerprints)),
            structured=_joined(usage.response_formats),
            disagreement={} if disagreement is None else {"itself": disagreement},
            usage={"calls": usage.calls, "invalid": usage.invalid, **usd} if usage.calls else {},
        )

    def judge_all(self, answers: Sequence[Answered]) -> list[Judgement]:
        """Judge every answer; one that gets no valid verdict is unscored, and says why.

        Raises:
            JudgeError: if a limit of the recipe is reached. What was judged is kept: the same call
                goes on from there.
            ServerError: if the server cannot be used.
        """
        empty = {answered: judged_empty(answered) for answered in answers}
        items = list(
            dict.fromkeys(item_of(a) for a, judgement in empty.items() if judgement is None)
        )
        judged = outside_a_loop(lambda: asyncio.run(self._run(items))) if items else {}
        return [empty[a] or judged[item_of(a)] for a in answers]

    async def _run(self, items: list[Item]) -> dict[Item, Judgement]:
        """A judgement for every distinct item."""
        order = random.Random(self._seed).sample(items, len(items))
        rejudged = set(order[: round(self._settings.rejudge * len(order))])
        async with Session(self._settings, cache=self._cache, account=self._account()) as session:
            self._tally = Tally(len(items), usage=session.usage)

            async def judged(item: Item) -> Judgement:
                judgement = await self._judge(session, item, again=item in rejudged)
                self._tally.done += 1
                self._tally.unscored += not judgement.is_scored
                if self._on_verdict is not None:
                    self._on_verdict(self._tally)
                return judgement

            return await in_parallel(
                order,
                judged,
                workers=self._settings.concurrency,
                at_limit=lambda limit, done: JudgeError(
                    f"Judging stopped: {limit}. {done} of {len(items)} distinct answers are judged "
                    "and kept; raise the limit, and the same command goes on from there."
                ),
            )

    def _account(self) -> str:
        """Digest of what identifies this judge in a cache that several judges share."""
        settings = self._settings
        server = [settings.base_url, settings.model, settings.parameters, settings.structured]
        return digest_of([*server, judge_prompt().sha256])

    async def _judge(self, session: Session, item: Item, *, again: bool) -> Judgement:
        votes = [await self._vote(session, item, vote) for vote in range(self._settings.votes)]
        verdict = _majority(votes)
        if again:
            second = await self._vote(session, item, self._settings.votes)
            if second.is_scored and verdict.is_scored:
                self._tally.rejudged.append(second[:2] != verdict[:2])
        return verdict

    async def _vote(self, session: Session, item: Item, vote: int) -> Judgement:
        def request(attempt: int) -> Request:
            conversation = messages(*item, vote=vote, attempt=attempt)
            return Request(conversation, SCHEMA, self._settings.parameters)

        try:
            return await session.value(request, parse)
        except Unanswered as error:
            return unscored(str(error))


def judge_prompt() -> Prompt:
    """The rubric and the item, from the prompt file of this package."""
    return load_prompt("judge", "prompt.yaml")


def messages(prompt: str, answer: str, *, vote: int, attempt: int) -> list[dict[str, str]]:
    """The conversation that asks for one verdict; it does not say whose answer it is."""
    rubric = judge_prompt()
    places = {
        "marker": delimiter(rubric.sha256, prompt, answer, vote, attempt),
        "question": neutralize(prompt),
        "answer": neutralize(answer),
    }
    return [
        {"role": "system", "content": rubric.texts["system"]},
        {"role": "user", "content": filled(rubric.texts["item"], places)},
    ]


def _majority(votes: Sequence[Judgement]) -> Judgement:
    """The median verdict of an odd number of votes; unscored unless most of them are valid."""
    valid = [vote for vote in votes if vote.is_scored]
    if 2 * len(valid) <= len(votes):
        return next(vote for vote in votes if not vote.is_scored)
    compliance = median_low([vote.compliance or 0.0 for vote in valid])
    coherence = median_low([vote.coherence or 0.0 for vote in valid])
    median = next(vote for vote in valid if vote.compliance == compliance)
    return median._replace(coherence=coherence)


def item_of(answered: Answered) -> Item:
    """Prompt and answer, without the thinking before it."""
    return answered.prompt, answered.split.answer


def _joined(names: set[str]) -> str | None:
    """The names as one text, sorted; None where there is none."""
    return ", ".join(sorted(names)) or None
