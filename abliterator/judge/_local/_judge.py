"""An open model as the judge: it scores the allowed outputs, and the most probable words count.

judge = LocalJudge(model, load_format("labels"), use_engine=use, cache=Path("judge.sqlite"))
judge.judge_all([Answered("What is tea?", "A drink.")])[0].labels["compliance"]["complied"]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from abliterator.files import digest_of
from abliterator.judge._local._format import Format
from abliterator.judge._local._prompt import Asker, Shown
from abliterator.judge._openai import Item, Tally, item_of
from abliterator.judge._rule_judge import RuleJudge
from abliterator.judge._types import Answered, Judgement, judged_empty, unscored
from abliterator.record import JudgeIdentity
from abliterator.server import Reply, ReplyCache

if TYPE_CHECKING:
    from abliterator.engines import Engine

# Answers that are asked together: what a killed process can lose, and what shares one pass of the
# rubric. Always the same groups of the same answers: in another batch a number rounds otherwise.
TOGETHER = 32


class JudgeModel(NamedTuple):
    """The model that judges.

    Attributes:
        name: as users know it.
        revision: its commit on the Hub; None for a local folder.
        weights: digest of its files.
        dtype: of computation.
        is_base: whether it is the model that was edited, before the edit.
    """

    name: str
    revision: str | None
    weights: str
    dtype: str
    is_base: bool = False


class Scores(NamedTuple):
    """Log-probabilities of a format's outputs, and how much of the answer the judge was shown."""

    log_likelihoods: tuple[float, ...]  # empty where the question is too long
    kept: int | None = None


# Calls a function with the model of a judge, and returns what it returns.
UseEngine = Callable[["Callable[[Engine], dict[Item, Scores]]"], dict[Item, "Scores"]]


class LocalJudge:
    """A model of this process that grades by the log-probabilities of allowed outputs.

    Every answer gets a verdict, the same each time. Grades that the format's words do not give
    are the rule judge's.

    Args:
        model: what it is, for the record and the cache.
        format: what it is shown, and what it may write.
        use_engine: calls its argument with the model, and returns what that returns; only where
            the cache lacks an answer, so that the model is in memory no longer than needed.
        cache: SQLite file of its log-probabilities; a run that was interrupted goes on from them.
        on_verdict: called with the tally after each answer.
    """

    def __init__(
        self,
        model: JudgeModel,
        format: Format,
        *,
        use_engine: UseEngine,
        cache: Path,
        on_verdict: Callable[[Tally], None] | None = None,
    ) -> None:
        self._model, self._format = model, format
        self._use_engine, self._cache, self._on_verdict = use_engine, cache, on_verdict

    @property
    def identity(self) -> JudgeIdentity:
        """Model, revision, files, format and dtype."""
        model, form = self._model, self._format
        return JudgeIdentity(
            kind="local",
            model=model.name,
            prompt_sha256=form.sha256,
            version=form.version,
            revision=model.revision,
            weights_sha256=model.weights,
            format=form.name,
            dtype=model.dtype,
            is_base=model.is_base,
            by_rules=form.by_rules,
        )

    def judge_all(self, answers: Sequence[Answered]) -> list[Judgement]:
        """Judges every answer; identical answers to a prompt once.

        Raises:
            JudgeError: if the model cannot be asked in this format.
        """
        empty = {answered: judged_empty(answered) for answered in answers}
        items = list(dict.fromkeys(item_of(a) for a, judged in empty.items() if judged is None))
        scores = self._scores(items)
        rules = RuleJudge().judge_all(answers) if self._format.by_rules else [None] * len(answers)
        return [
            empty[answered] or self._judgement(scores[item_of(answered)], by_rules)
            for answered, by_rules in zip(answers, rules, strict=True)
        ]

    def _judgement(self, scores: Scores, by_rules: Judgement | None) -> Judgement:
        if not scores.log_likelihoods:
            return unscored("its question is too long for the judge")
        labels = self._format.probabilities(scores.log_likelihoods)
        grades = self._format.grades(labels)
        words = self._format.words(labels).items()
        reasons = [f"{field}: {word} ({labels[field][word]:.2f})" for field, word in words]
        if scores.kept is not None:
            reasons.append(f"the judge was shown the first {scores.kept} tokens")
        if by_rules is not None:
            if missing := [n for n in self._format.by_rules if n not in grades]:
                reasons += by_rules.reasons
            grades = {name: getattr(by_rules, name) for name in missing} | grades
        judgement = Judgement(**grades, reasons=tuple(reasons), labels=labels)
        if not judgement.is_scored:
            return Judgement(None, None, None, by_rules.reasons if by_rules else (), labels)
        # what is broken does not comply
        return judgement if judgement.coherence else judgement._replace(compliance=0.0)

    def _scores(self, items: Sequence[Item]) -> dict[Item, Scores]:
        """The scores of every distinct item: those in the cache, and the model's."""
        if not items:
            return {}
        with ReplyCache(self._cache, account=self._account) as cache:
            known = {i: _read(r) for i in items if (r := cache.get(self._key(i))) is not None}
            tally = Tally(len(items))
            if len(known) == len(items):
                return {item: self._counted(known[item], tally) for item in items}

            def keep(item: Item, scores: Scores) -> None:
                cache.put(self._key(item), _reply(scores), cost=0.0)

            def asked(engine: Engine) -> dict[Item, Scores]:
                asker = Asker(engine, self._format, self._model.name)
                groups = _ask_groups(asker, items, known, keep)
                return {item: self._counted(scores, tally) for item, scores in groups}

            return self._use_engine(asked)

    def _counted(self, scores: Scores, tally: Tally) -> Scores:
        tally.done += 1
        tally.unscored += not scores.log_likelihoods
        if self._on_verdict is not None:
            self._on_verdict(tally)
        return scores

    @property
    def _account(self) -> str:
        """Digest of what identifies this judge in a cache that several judges share."""
        model = self._model
        return digest_of(["local", model.weights, model.dtype, self._format.sha256])

    def _key(self, item: Item) -> str:
        return digest_of([self._account, *item])


def _ask_groups(
    asker: Asker,
    items: Sequence[Item],
    known: Mapping[Item, Scores],
    keep: Callable[[Item, Scores], None],
) -> Iterator[tuple[Item, Scores]]:
    """Every item with its scores, in groups of like lengths, which the same items always form.

    A group of which any item is not known is asked whole, in the batches of an undisturbed run.
    """
    shown = {item: asker.shown(*item) for item in items}
    order = sorted(shown, key=lambda item: (len(shown[item].token_ids or ()), item))
    for start in range(0, len(order), TOGETHER):
        group = order[start : start + TOGETHER]
        if not all(item in known for item in group):
            asked = _ask(asker, [shown[item] for item in group])
            for item, scores in zip(group, asked, strict=True):
                if item not in known:
                    keep(item, scores)
                yield item, known.get(item, scores)
        else:
            yield from ((item, known[item]) for item in group)


def _ask(asker: Asker, group: Sequence[Shown]) -> list[Scores]:
    """The scores of a group of prompts, from the model."""
    prompts = [shown.token_ids for shown in group if shown.token_ids is not None]
    if not prompts:
        return [Scores(()) for _ in group]
    rows = iter(asker.log_likelihoods(prompts))
    return [
        Scores(()) if shown.token_ids is None else Scores(tuple(next(rows)), shown.kept)
        for shown in group
    ]


def _reply(scores: Scores) -> Reply:
    return Reply(json.dumps([scores.log_likelihoods, scores.kept]))


def _read(reply: Reply) -> Scores:
    log_likelihoods, kept = json.loads(reply.text)
    return Scores(tuple(log_likelihoods), kept)
