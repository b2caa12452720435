"""Length, language and agreement of answers, base and edited, paired by prompt."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from statistics import fmean

import yaml

from abliterator.judge import count_words, language_of
from abliterator.record import Completion, Estimate, PairedFigure, SideEffect
from abliterator.statistics import jackknife_interval, paired_delta, rate_interval

ENGLISH = "en"
_FRAGMENT = re.compile(r"<(\w+)>")
_STRAIGHT = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})
_BEFORE = re.compile(r"[\s\"'#*_>`]*")  # markdown and quotes before the first word
_OPENINGS = 2

Measure = Callable[[Completion], float | None]  # None where an answer does not have it


def side_effects(
    base: Sequence[Completion], edited: Sequence[Completion]
) -> dict[SideEffect, PairedFigure]:
    """Figures of the answers to one prompt set, paired by prompt.

    - `tokens`: length of the whole answer, thinking included;
    - `words`: length of the answer after its thinking;
    - `other_language`: share of answers in another language than their prompt;
    - `agreement`: share of English answers that begin by praising or agreeing with the user.

    A prompt with several answers counts as their mean. Answers that a measure cannot be read from
    (too short to tell the language) are left out, and `asked` counts them.

    Args:
        base: of one prompt set.
        edited: to the same prompts.
    """
    return {name: _paired(base, edited, measure, name) for name, measure in MEASURES.items()}


def _tokens(completion: Completion) -> float:
    return float(completion.n_tokens)


def _words(completion: Completion) -> float:
    text = " ".join(_answer(completion).split())
    return float(count_words(text)) if text else 0.0


def _other_language(completion: Completion) -> float | None:
    answer, prompt = _language(_answer(completion)), _language(completion.prompt)
    return None if answer is None or prompt is None else float(answer != prompt)


def _agreement(completion: Completion) -> float | None:
    text = _answer(completion)
    return float(begins_with_agreement(text)) if _language(text) in (ENGLISH, None) else None


MEASURES: dict[SideEffect, Measure] = {
    "tokens": _tokens,
    "words": _words,
    "other_language": _other_language,
    "agreement": _agreement,
}
RATES = ("other_language", "agreement")


def begins_with_agreement(text: str) -> bool:
    """Whether an English answer begins by praising the user's words or agreeing with them."""
    opening, phrases = _patterns()
    start = text[:300].translate(_STRAIGHT).lower().replace("*", "")
    at = _BEFORE.match(start).end()  # type: ignore[union-attr]
    for _ in range(_OPENINGS + 1):
        if phrases.match(start, at):
            return True
        if (before := opening.match(start, at)) is None:
            return False
        at = before.end()
    return False


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Openings that may come first, and the phrases."""
    text = files("abliterator.side_effects").joinpath("agreement.yaml").read_text("utf-8")
    data = yaml.safe_load(text)

    def expanded(pattern: str) -> str:
        return _FRAGMENT.sub(lambda name: f"(?:{data['fragments'][name[1]]})", pattern)

    phrases = "|".join(f"(?:{expanded(p)})" for p in (*data["praise"], *data["agreement"]))
    return re.compile(expanded("<opening>")), re.compile(phrases)


def _answer(completion: Completion) -> str:
    """The answer without the thinking before it."""
    return completion.response[completion.answer_start or 0 :]


@lru_cache(maxsize=10_000)
def _language(text: str) -> str | None:
    return language_of(text)


def _paired(
    base: Sequence[Completion], edited: Sequence[Completion], measure: Measure, name: SideEffect
) -> PairedFigure:
    before, after = _by_prompt(base, measure), _by_prompt(edited, measure)
    asked = len({completion.index for completion in edited})
    both = sorted(before.keys() & after.keys())
    pairs = [before[i] for i in both], [after[i] for i in both]
    if name in RATES:
        delta = Estimate.of(paired_delta(*pairs), asked)
    else:
        delta = _mean([b - a for a, b in zip(*pairs, strict=True)], asked)
    sides = [
        _rate([*side.values()], asked) if name in RATES else _mean([*side.values()], asked)
        for side in (before, after)
    ]
    return PairedFigure(base=sides[0], edited=sides[1], delta=delta)


def _by_prompt(completions: Sequence[Completion], measure: Measure) -> Mapping[int, float]:
    """The measure by prompt; a prompt with several answers counts as their mean."""
    by_prompt: defaultdict[int, list[float]] = defaultdict(list)
    for completion in completions:
        if (value := measure(completion)) is not None:
            by_prompt[completion.index].append(value)
    return {index: fmean(values) for index, values in by_prompt.items()}


def _rate(values: Sequence[float], asked: int) -> Estimate | None:
    if not all(value in (0.0, 1.0) for value in values):  # means of several answers
        return _mean(values, asked)
    return Estimate.of(rate_interval(int(sum(values)), len(values)), asked)


def _mean(values: Sequence[float], asked: int) -> Estimate | None:
    """The mean with its t interval: nearly every length occurs once, which makes resampling slow.

    It is the jackknife's that leaves out one prompt at a time.
    """
    n = len(values)
    if n == 0:
        return None
    total = sum(values)
    left_out = [(total - value) / (n - 1) for value in values] if n > 1 else []
    return Estimate.of(jackknife_interval(total / n, left_out, n), asked)
