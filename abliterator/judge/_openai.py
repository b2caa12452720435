"""An LLM judge behind an OpenAI-compatible server: votes, retries of invalid verdicts, resumption.

Answers that are alike word for word are judged once, blind to their side, in a seeded order. A
seeded share is judged once more, to tell how often the judge disagrees with itself.

    judge = OpenAIJudge(settings, cache=Path("work/judge.sqlite"))
    judge.judge_all([Answered("What is tea?", "A drink.")])
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any, TypeVar

from abliterator.errors import JudgeError
from abliterator.judge._budget import Budget, OutOfBudget
from abliterator.judge._cache import Reply, ReplyCache
from abliterator.judge._parse import InvalidVerdict, parse
from abliterator.judge._prompt import judge_prompt, messages
from abliterator.judge._server import NoReply, Server
from abliterator.judge._types import Answered, Judgement, judged_empty, split_thinking, unscored
from abliterator.record import Estimate, JudgeIdentity
from abliterator.statistics import rate_interval

if TYPE_CHECKING:
    from abliterator.recipe import JudgeSettings

COMPLETE = {"stop", "eos", "eos_token", None}  # reasons to finish that leave a whole reply


@dataclass
class Tally:
    """How far a judging run has come, and what its servers said of themselves."""

    total: int
    done: int = 0
    unscored: int = 0
    calls: int = 0
    cost: float = 0.0
    invalid: int = 0
    models: set[str] = field(default_factory=set)
    fingerprints: set[str] = field(default_factory=set)
    rungs: set[str] = field(default_factory=set)
    rejudged: list[bool] = field(default_factory=list)  # whether the second verdict was another

    def __str__(self) -> str:
        money = f", ${self.cost:.4f}" if self.cost else ""
        return f"{self.unscored} unscored, {self.calls} calls{money}"


class OpenAIJudge:
    """A judge on a server; `identity` says more of it once it has judged.

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
        self._cache_path = cache
        self._seed = seed
        self._on_verdict = on_verdict
        self._tally = Tally(0)

    @property
    def identity(self) -> JudgeIdentity:
        """Model, prompt and settings; after judging also what was found out on the way."""
        tally, settings, prompt = self._tally, self._settings, judge_prompt()
        again = rate_interval(sum(tally.rejudged), len(tally.rejudged))
        estimate = None if again is None else Estimate.model_validate(again._asdict())
        return JudgeIdentity(
            kind="openai",
            model=settings.model,
            prompt_sha256=prompt.sha256,
            version=prompt.version,
            base_url=settings.base_url,
            votes=settings.votes,
            served_model=_only(tally.models),
            fingerprints=tuple(sorted(tally.fingerprints)),
            structured=_only(tally.rungs),
            disagreement={} if estimate is None else {"itself": estimate},
            usage=self._usage(),
        )

    def _usage(self) -> dict[str, float]:
        """Calls, and dollars where the recipe has prices."""
        if not self._tally.calls:
            return {}
        usd = {} if self._settings.prices is None else {"usd": round(self._tally.cost, 6)}
        return {"calls": self._tally.calls, **usd}

    def judge_all(self, answers: Sequence[Answered]) -> list[Judgement]:
        """Judge every answer; one that gets no valid verdict is unscored, and says why.

        Raises:
            JudgeError: if the server cannot be used, or a limit of the recipe is reached. What was
                judged is kept: the same call goes on from there.
        """
        found = {answered: judged_empty(answered) for answered in answers}
        asked = list(dict.fromkeys(_text(a) for a, judgement in found.items() if judgement is None))
        judged = _outside_a_loop(lambda: self._run(asked)) if asked else {}
        return [found[a] or judged[_text(a)] for a in answers]

    def _run(self, items: list[tuple[str, str]]) -> dict[tuple[str, str], Judgement]:
        with ReplyCache(self._cache_path, judge=_digest(self._asks())) as cache:
            calls, cost = cache.totals()
            budget = Budget(self._settings, calls=calls, cost=cost)
            self._tally = Tally(len(items), calls=calls, cost=cost)
            run = _Run(self._settings, self._asks(), cache, budget, self._tally, self._on_verdict)
            return asyncio.run(run.all(items, self._seed))

    def _asks(self) -> dict[str, Any]:
        """Everything but the messages that a reply depends on."""
        settings = self._settings
        return {
            "base_url": settings.base_url,
            "model": settings.model,
            "parameters": settings.parameters,
            "structured": settings.structured,
            "prompt": judge_prompt().sha256,
        }


T = TypeVar("T")


def _outside_a_loop(work: Callable[[], T]) -> T:
    """Calls `work`, in a thread of its own where an event loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


@dataclass
class _Run:
    """One run over distinct items: workers that share an iterator, a cache and a budget."""

    settings: JudgeSettings
    asks: dict[str, Any]
    cache: ReplyCache
    budget: Budget
    tally: Tally
    on_verdict: Callable[[Tally], None] | None
    stopped: OutOfBudget | JudgeError | None = None

    async def all(
        self, items: list[tuple[str, str]], seed: int
    ) -> dict[tuple[str, str], Judgement]:
        """A judgement for every item."""
        order = random.Random(seed).sample(items, len(items))
        twice = set(order[: round(self.settings.rejudge * len(order))])
        queue, found = iter(order), dict[tuple[str, str], Judgement]()
        async with Server(self.settings, self.budget) as server:
            workers = [
                self._work(server, queue, found, twice) for _ in range(self.settings.concurrency)
            ]
            await asyncio.gather(*workers)
        if isinstance(self.stopped, JudgeError):
            raise self.stopped
        if self.stopped is not None:
            raise JudgeError(
                f"Judging stopped: {self.stopped}. {len(found)} of {len(items)} distinct answers "
                "are judged and kept; raise the limit, and the same command goes on from there."
            )
        return found

    async def _work(
        self,
        server: Server,
        queue: Iterator[tuple[str, str]],
        found: dict[tuple[str, str], Judgement],
        twice: set[tuple[str, str]],
    ) -> None:
        for item in queue:
            if self.stopped is not None:
                return
            try:
                found[item] = await self._judge(server, item, again=item in twice)
            except (OutOfBudget, JudgeError) as stop:
                # the others finish the call they are in: it is paid for
                self.stopped = self.stopped or stop
                return
            self._told(found[item])

    async def _judge(self, server: Server, item: tuple[str, str], *, again: bool) -> Judgement:
        votes = [await self._vote(server, item, vote) for vote in range(self.settings.votes)]
        verdict = _majority(votes)
        if again:
            second = await self._vote(server, item, self.settings.votes)
            if second.is_scored and verdict.is_scored:
                self.tally.rejudged.append(second[:2] != verdict[:2])
        return verdict

    async def _vote(self, server: Server, item: tuple[str, str], vote: int) -> Judgement:
        """One verdict, asked for anew with a fresh marker as long as replies are invalid."""
        why = ""
        for attempt in range(1 + self.settings.retries):
            try:
                return await self._verdict(server, item, vote, attempt)
            except NoReply as error:
                return unscored(f"no reply ({error})")
            except InvalidVerdict as error:
                self.tally.invalid += 1
                why = str(error)
        return unscored(f"{1 + self.settings.retries} invalid replies, the last: {why}")

    async def _verdict(
        self, server: Server, item: tuple[str, str], vote: int, attempt: int
    ) -> Judgement:
        asked = messages(*item, vote=vote, attempt=attempt)
        key = _digest([self.asks, asked, vote, attempt])
        reply = self.cache.get(key)
        if reply is None:
            reply = await server.ask(asked)
            cost = self.budget.price(reply)
            self.cache.put(key, reply, cost=cost)
            self.budget.spend(cost)
        self._heard(reply)
        if reply.finish_reason not in COMPLETE:
            raise InvalidVerdict(f"finished by {reply.finish_reason}")
        return parse(reply.text)

    def _heard(self, reply: Reply) -> None:
        tally = self.tally
        for told, where in (
            (reply.model, tally.models),
            (reply.fingerprint, tally.fingerprints),
            (reply.rung, tally.rungs),
        ):
            if told is not None:
                where.add(told)
        tally.calls, tally.cost = self.budget.calls, self.budget.cost

    def _told(self, judgement: Judgement) -> None:
        self.tally.done += 1
        self.tally.unscored += not judgement.is_scored
        if self.on_verdict is not None:
            self.on_verdict(self.tally)


def _majority(votes: Sequence[Judgement]) -> Judgement:
    """The median verdict of an odd number of votes; unscored unless most of them are valid."""
    valid = [vote for vote in votes if vote.is_scored]
    if 2 * len(valid) <= len(votes):
        return next(vote for vote in votes if not vote.is_scored)
    compliance = median_low([vote.compliance or 0.0 for vote in valid])
    coherence = median_low([vote.coherence or 0.0 for vote in valid])
    speaker = next(vote for vote in valid if vote.compliance == compliance)
    return speaker._replace(coherence=coherence)


def _text(answered: Answered) -> tuple[str, str]:
    """What a judge is shown: the thinking is not the answer."""
    return answered.prompt, split_thinking(answered.response)[1]


def _only(told: set[str]) -> str | None:
    """One name, or all of them in one text where a run met several."""
    return ", ".join(sorted(told)) or None


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
