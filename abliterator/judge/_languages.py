"""The language of a text, and how answers in other languages than English decline.

Most languages are identified by their script, those of one script by function words and rare
letters. Short word lists, and no library: verdicts depend on it, so it may change only with the
judge's version.

    unreadable("Habari?", "Samahani, siwezi kusaidia na ombi hilo.")  # "it is in Swahili, ..."
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from abliterator.judge._scripts import script_of, words

ENGLISH = "en"
PRESENT = 0.2  # share of a sentence's letters from which on a script's phrases are looked for
READ = 0.5  # share of letters in scripts without phrases above which a text cannot be read
ONE_SCRIPT = 0.8  # share of letters from which on a text is in one script, and not in any
KANA = 0.1  # share of kana in Chinese characters from which on a text is Japanese
IDEOGRAPH = 2  # letters that a Chinese character counts as
PROSE = 6  # words in a row from which on they are prose, which holds function words
# Share of prose that function words or affixes of a listed language are, at least. Of 1017 English
# answers the lowest is 0.22; among the many languages in Latin letters some words always coincide.
FUNCTION_WORDS = 0.1
FUNCTION_WORDS_LATIN = 0.2
FEW_LANGUAGES = 2  # of a script, up to which a text in it is in one of those listed
INFLECTED = 5  # letters above which an affix may identify a language
MARGIN = 1.1  # by which a language without phrases must lead one with them,
EVIDENCE = 2  # distinct words that must be of it,
EVIDENCE_SHARE = 0.15  # their share of all words,
SYLLABLE = 2  # and letters that one of them exceeds: "la la, na na" is no Swahili

_FRAGMENT = re.compile(r"<(\w+)>")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\S+@\S+|\$[^$\n]*\$", re.DOTALL)
_PROSE_WORD = re.compile(r"[^\W\d_][^\W\d_'\-\u0900-\u0dff]*[\w'\-\u0900-\u0dff]*")
_DROPPED = dict.fromkeys(map(ord, "\u0640\u200b\u200c\u200d\u0307\u0670"))
_MARKS = dict.fromkeys(range(0x64B, 0x653))
_LETTERS = str.maketrans(
    {**dict.fromkeys("أإآٱ", "ا"), **dict.fromkeys("ىی", "ي"), "ک": "ك", "ة": "ه", "ё": "е"}
)
_STRAIGHT = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "ʻ": "'"})


# What asks for words of a language, and not for an answer in it.
_PUTS = re.compile(
    r"\b(?:translat\w+|mean(?:s|ing)?|phrases?|sentences?|words? for|expressions?"
    r"|say ['\"“‘]|how\b.{0,40}\b(?:say|spell|write|put))",
    re.IGNORECASE,
)


class Language(NamedTuple):
    """A language: what distinguishes it from others of its script, and its phrases, if known."""

    code: str
    name: str
    script: str
    words: frozenset[str]
    letters: frozenset[str]
    affixes: re.Pattern[str] | None
    kinds: Mapping[str, re.Pattern[str]]  # kind of phrase -> pattern
    idioms: re.Pattern[str] | None

    @property
    def is_readable(self) -> bool:
        """Whether the rules have phrases for it."""
        return bool(self.kinds) or self.code == ENGLISH


def raw_languages() -> bytes:
    """The data file, as it is."""
    return files("abliterator.judge").joinpath("languages.yaml").read_bytes()


@cache
def _data() -> dict[str, Any]:
    return yaml.safe_load(raw_languages())  # type: ignore[no-any-return]


@cache
def languages() -> dict[str, Language]:
    """Code -> language, compiled once."""
    return {code: _compiled(code, entry) for code, entry in _data()["languages"].items()}


@cache
def english(name: str) -> re.Pattern[str]:
    """A pattern of English prompts or of beginnings of answers."""
    raw = files("abliterator.judge").joinpath("english.yaml").read_bytes()
    return re.compile(yaml.safe_load(raw)[name])


@cache
def form(name: str) -> re.Pattern[str]:
    """A pattern of prompts or of beginnings of answers, in every language but English."""
    return re.compile(fold("|".join(_data()["forms"][name])))


def joined(alternatives: Sequence[str], fragments: Mapping[str, Sequence[str]]) -> str:
    """Alternatives as one pattern, with every `<name>` replaced by the fragment of that name."""
    return _FRAGMENT.sub(
        lambda name: f"(?:{joined(fragments[name[1]], fragments)})", "|".join(alternatives)
    )


def _compiled(code: str, entry: Mapping[str, Any]) -> Language:
    def pattern(alternatives: Sequence[str]) -> re.Pattern[str]:
        return re.compile(fold(joined(alternatives, entry.get("fragments", {}))))

    phrases = dict(entry.get("phrases", {}))
    idioms = phrases.pop("idioms", None)
    return Language(
        code=code,
        name=entry["name"],
        script=entry["script"],
        words=frozenset(_normalised(entry.get("words", "")).split()),
        letters=frozenset(_normalised(entry.get("letters", ""))),
        affixes=re.compile(_normalised(entry["affixes"])) if "affixes" in entry else None,
        kinds={kind: pattern(alternatives) for kind, alternatives in phrases.items()},
        idioms=pattern(idioms) if idioms else None,
    )


def fold(text: str) -> str:
    """A lower-case text with one spelling for what is written in several: marks, Arabic letters."""
    if text.isascii():
        return text
    plain = unicodedata.normalize("NFKC", text).translate(_DROPPED).translate(_MARKS)
    return plain.translate(_LETTERS)


def speaks_of_a_language(prompt: str) -> bool:
    """Whether an English prompt asks how something is put in another language."""
    if not _PUTS.search(prompt):
        return False
    names = "|".join(language.name for language in languages().values() if language.code != ENGLISH)
    return (
        re.search(rf"\b(?:translat\w+|{re.sub(r',? or |, ', '|', names)})\b", prompt, re.I)
        is not None
    )


def _normalised(text: str) -> str:
    return unicodedata.normalize("NFKC", text.translate(_STRAIGHT)).lower()


def foreign_kinds(sentence: str) -> dict[str, str]:
    """Kind -> language of a phrase of that kind in a lower-case sentence that is not English."""
    if sentence.isascii() and len(sentence) < 2:
        return {}
    text = fold(sentence)
    matches: dict[str, str] = {}
    for language in _candidates(sentence):
        if language.idioms is None or not language.idioms.search(text):
            for kind, pattern in language.kinds.items():
                if kind not in matches and pattern.search(text):
                    matches[kind] = language.name
    return matches


def _candidates(sentence: str) -> Iterator[Language]:
    """The languages that a sentence may be in, by its scripts, and by its words if it is Latin."""
    shares = _scripts_in(sentence)
    present = {script for script, share in shares.items() if share >= PRESENT}
    latin = "LATIN" in present
    scores, _ = _evidence(_tokens(sentence), "LATIN") if latin else ({}, {})
    for language in languages().values():
        if language.kinds and language.script in present:
            is_latin = language.script == "LATIN"
            if not is_latin or scores.get(language.code, 0) >= scores.get(ENGLISH, 0):
                yield language


def _scripts_in(text: str) -> dict[str, float]:
    """Script -> its share of the letters; Chinese characters among kana are Japanese."""
    counts = Counter(script_of(c) for c in text if c.isalpha())
    counts.pop("", None)
    counts["CJK"] *= IDEOGRAPH
    if counts["KANA"] > KANA * (counts["CJK"] / IDEOGRAPH + counts["KANA"]):
        counts["KANA"] += counts.pop("CJK")
    total = counts.total()
    return {script: n / total for script, n in counts.items() if n}


def _tokens(text: str) -> list[str]:
    """Words in lower case with their apostrophes, single letters left out: they name variables."""
    cleaned = _normalised(text)
    return [
        w for w in re.findall(r"[^\W\d_](?:[\w\u0900-\u0dff]|'(?=\w))*'?", cleaned) if len(w) > 1
    ]


@cache
def _lexicon(script: str) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """(word -> languages, letter -> languages) of a script."""
    by_word, by_letter = defaultdict(list), defaultdict(list)
    for language in languages().values():
        if language.script == script:
            for word in language.words:
                by_word[word].append(language.code)
            for letter in language.letters:
                by_letter[letter].append(language.code)
    return (
        {word: tuple(codes) for word, codes in by_word.items()},
        {letter: tuple(codes) for letter, codes in by_letter.items()},
    )


@cache
def _inflecting(script: str) -> list[tuple[str, re.Pattern[str]]]:
    return [(x.code, x.affixes) for x in languages().values() if x.affixes and x.script == script]


def _inflected(token: str, script: str) -> tuple[str, ...]:
    """The languages of whose affixes a longer word has one: these have few function words."""
    if len(token) <= INFLECTED:
        return ()
    return tuple(code for code, affixes in _inflecting(script) if affixes.search(token))


def _evidence(
    tokens: Sequence[str], script: str
) -> tuple[dict[str, float], dict[str, Counter[str]]]:
    """(language -> weight, language -> its evidence); a token of many languages weighs less."""
    by_word, by_letter = _lexicon(script)
    weights: dict[str, float] = defaultdict(float)
    support: dict[str, Counter[str]] = defaultdict(Counter)
    for token in tokens:
        reasons = [by_word.get(token, ())]
        if not token.isascii() or script != "LATIN":
            reasons += [by_letter[c] for c in set(token) if c in by_letter]
        reasons.append(_inflected(token, script))
        for codes in reasons:
            for code in codes:
                weights[code] += 1 / len(codes)
        for code in {code for codes in reasons for code in codes}:
            support[code][token] += 1
    return weights, support


class Reading(NamedTuple):
    """The language of a text, None where it is unknown, and why the rules cannot read it."""

    language: Language | None
    problem: str | None = None


def reading_of(text: str) -> Reading:
    """The language of most letters of a text, without its code and addresses."""
    text = _CODE.sub(" ", text)
    shares = _scripts_in(text)
    if not shares:
        return Reading(None)
    scripts = {language.script for language in languages().values()}
    foreign = {name: share for name, share in shares.items() if name not in scripts}
    if sum(foreign.values()) > READ:
        name = max(foreign, key=lambda name: foreign[name]).title()
        return Reading(None, f"it is in {name} script, for which the rules have no phrases")
    script = max(shares.keys() - foreign.keys(), key=lambda name: shares[name])
    candidates = [language for language in languages().values() if language.script == script]
    if len(candidates) == 1:
        return Reading(candidates[0])
    return _best_supported(candidates, text, script)


def language_of(text: str) -> str | None:
    """Code of the language of most letters of a text, as in "en"; None where it cannot be told.

    Of a script in which no listed language is written, its name in lower case, as in "georgian".
    """
    language, _ = reading_of(text)
    if language is not None:
        return language.code
    shares = _scripts_in(_CODE.sub(" ", text))
    script = max(shares, key=lambda name: shares[name], default="")
    listed = {listed.script for listed in languages().values()}
    return script.lower() if script not in listed and shares.get(script, 0) > READ else None


def is_in_one_script(text: str) -> bool:
    """Whether nearly all letters are of one writing system."""
    return max(_scripts_in(text).values(), default=1.0) >= ONE_SCRIPT


def _best_supported(candidates: Sequence[Language], text: str, script: str) -> Reading:
    """The candidate language with the most evidence in the words of a text."""
    tokens = _tokens(text)
    weights, support = _evidence(tokens, script)
    readable = max((x for x in candidates if x.is_readable), key=lambda x: weights.get(x.code, 0))
    other = max((x for x in candidates if not x.is_readable), key=lambda x: weights.get(x.code, 0))
    speakers = support[other.code]
    if (
        weights.get(other.code, 0) > MARGIN * weights.get(readable.code, 0)
        and len(speakers) >= EVIDENCE
        and max(map(len, speakers)) > SYLLABLE
        and speakers.total() >= EVIDENCE_SHARE * len(tokens)
    ):
        return Reading(other, f"it is in {other.name}, for which the rules have no phrases")
    least_share = FUNCTION_WORDS_LATIN if script == "LATIN" else FUNCTION_WORDS
    prose = _prose(text) if len(candidates) > FEW_LANGUAGES else []
    if prose and not any(
        sum(word in support[x.code] or word in x.words for word in tokens_read)
        >= least_share * len(tokens_read)
        for x in candidates
        if x.is_readable
        for tokens_read in (prose, tokens)
    ):
        return Reading(None, f"the language of its {script.title()} letters cannot be told")
    return Reading(readable if weights.get(readable.code, 0) else None)


def _prose(text: str) -> list[str]:
    """Words, in lower case, that follow each other without punctuation, digits or names."""
    prose = []
    for line in text.translate(_STRAIGHT).splitlines():
        run: list[str] = []
        for token in line.split():
            word = token.strip("\"'«»„“”()[]*_¿¡").rstrip(".,;:!?…।؟،۔\"'»)*_")
            is_prose = _PROSE_WORD.fullmatch(word) is not None and (not run or word == word.lower())
            if is_prose:
                run.append(_normalised(word))
            ends_clause = token[-1] in ".,;:!?…।؟،۔)"
            if not is_prose or ends_clause:
                prose += run if len(run) >= PROSE else []
                run = [_normalised(word)] if _PROSE_WORD.fullmatch(word) and not ends_clause else []
        prose += run if len(run) >= PROSE else []
    return prose


def unreadable(prompt: str, answer: str) -> str | None:
    """Why the rules cannot read an answer; None if they can, or there is no language in it."""
    language, problem = reading_of(answer)
    if problem or language or not words(_CODE.sub(" ", answer)):
        return problem
    # a few words of no known language: most likely in the language of the prompt
    if not any(len(token) > 1 for token in _tokens(answer)):
        return None
    of_prompt = reading_of(prompt).problem
    return of_prompt and f"no word tells its language, and of the prompt: {of_prompt}"
