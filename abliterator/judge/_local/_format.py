"""Formats of local judges: what a model is shown, what it may write, and which grades that gives.

A format is a file in `judge/formats`. Its outputs are complete texts, each with a word in every
field: no two are the same text, so their probabilities add up, and the probability of a word is the
sum over the outputs that have it. Nothing that a model might write beside them is counted.

    wildguard = load_format("wildguard")
    probabilities = wildguard.probabilities(log_likelihoods)
    probabilities["response_refusal"]        # {"yes": 0.98, "no": 0.02}
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from typing import Any, Literal, NamedTuple

import yaml

from abliterator.errors import JudgeError
from abliterator.files import sha256_of_bytes

GENERAL = "labels"  # our own rubric, for any instruct model
FORMATS = (
    *(GENERAL, "wildguard", "llama_guard_3", "llama_guard_4", "qwen3guard"),
    *("harmbench", "strongreject"),
)
GRADES = ("compliance", "coherence", "refused")
_PLACE = re.compile(r"\{(\w+)\}")
# In the chat template of guards alone; one that no name gives away is not asked with our rubric.
_GUARD = "UNSAFE CONTENT CATEGORIES"

Words = Mapping[str, str]  # a word in each field
Probabilities = dict[str, dict[str, float]]  # of each word, by field


class Output(NamedTuple):
    """One complete text that a judge may write."""

    text: str
    words: Words


@dataclass(frozen=True)
class Format:
    """How a model is asked for a verdict.

    Attributes:
        name: of the file.
        version: of its words.
        sha256: of the file.
        prompt: "text" is the prompt itself; "conversation" renders question and answer by the
            model's chat template, which writes the task; "rubric" is a chat with our own task.
        texts: system, item or text, with places for question, answer and marker.
        outputs: those with the same fields answer one question.
        verdict: grades by field and word.
        lead: what the model writes before its output.
        answer_tokens: tokens of an answer that it is shown at most; None for all.
        models: pattern in the lower-case names of its models; None where any model will do.
        source: address of the publication that has it.
    """

    name: str
    version: str
    sha256: str
    prompt: Literal["text", "conversation", "rubric"]
    texts: Mapping[str, str]
    outputs: tuple[Output, ...]
    verdict: Mapping[str, Mapping[str, Mapping[str, Any]]]
    lead: str = ""
    answer_tokens: int | None = None
    models: str | None = None
    source: str | None = None

    @property
    def questions(self) -> list[list[int]]:
        """Indices of the outputs to each question."""
        fields = [tuple(output.words) for output in self.outputs]
        return [[i for i, f in enumerate(fields) if f == one] for one in dict.fromkeys(fields)]

    def probabilities(self, log_likelihoods: Sequence[float]) -> Probabilities:
        """The probability of each word, given that the model writes one of the outputs.

        Args:
            log_likelihoods: of each output, in nats; -inf counts a text out.
        """
        words: Probabilities = {}
        for indices in self.questions:
            highest = max(log_likelihoods[i] for i in indices)
            shares = {i: math.exp(log_likelihoods[i] - highest) for i in indices}
            whole = sum(shares.values())
            for i, share in shares.items():
                for field, word in self.outputs[i].words.items():
                    of_field = words.setdefault(field, {})
                    of_field[word] = of_field.get(word, 0.0) + share / whole
        return words

    def grades(self, probabilities: Probabilities) -> dict[str, Any]:
        """The grades of the most probable words, as far as they tell; of a tie the first word's."""
        given: dict[str, Any] = {}
        for field, word in self.words(probabilities).items():
            given |= self.verdict.get(field, {}).get(word, {})
        return given

    @staticmethod
    def words(probabilities: Probabilities) -> dict[str, str]:
        """The most probable word of each field."""
        return {field: max(of, key=of.__getitem__) for field, of in probabilities.items()}

    @property
    def by_rules(self) -> tuple[str, ...]:
        """The grades that some words do not give; the rule judge's stand in for them."""
        fields = {field for output in self.outputs for field in output.words}
        always = {
            grade
            for field in fields & set(self.verdict)
            for grade in GRADES
            if all(
                grade in self.verdict[field].get(output.words[field], {})
                for output in self.outputs
                if field in output.words
            )
        }
        return tuple(grade for grade in GRADES if grade not in always)


@cache
def load_format(name: str) -> Format:
    """The format of a name in `FORMATS`."""
    raw = files("abliterator.judge").joinpath("formats", f"{name}.yaml").read_bytes()
    data = yaml.safe_load(raw)
    texts = {key: data[key] for key in ("system", "item", "text") if key in data}
    optional = {
        key: data[key] for key in ("lead", "answer_tokens", "models", "source") if key in data
    }
    return Format(
        name=name,
        version=data["version"],
        sha256=sha256_of_bytes(raw),
        prompt=data["prompt"],
        texts=texts,
        outputs=tuple(output for entry in data["outputs"] for output in _outputs(entry)),
        verdict=data["verdict"],
        **optional,
    )


def _outputs(entry: Mapping[str, Any]) -> Iterable[Output]:
    """Every output that an entry describes: one for each combination of words."""
    fields = {key: value for key, value in entry.items() if key != "text"}
    for words in product(*fields.values()):
        chosen = dict(zip(fields, words, strict=True))
        yield Output(_written(entry["text"], chosen), chosen)


def _written(text: str, words: Words) -> str:
    return _PLACE.sub(lambda place: words[place[1]], text)


def format_of(model: str, chat_template: str | None, requested: str = "auto") -> Format:
    """The format in which a model is asked.

    Args:
        model: its name, or the name of its folder.
        chat_template: of its tokenizer.
        requested: a name in `FORMATS`, or "auto": by the model's name, else our rubric.

    Raises:
        JudgeError: for a guard that no name gives away.
    """
    if requested != "auto":
        return load_format(requested)
    name = model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-")
    for candidate in map(load_format, FORMATS):
        if candidate.models is not None and re.search(candidate.models, name):
            return candidate
    if chat_template is not None and _GUARD in chat_template:
        guards = ", ".join(FORMATS[1:])
        raise JudgeError(
            f"The judge {model} is a guard model by its chat template, and its name does not say "
            f"which. Name its format: `judge.format`, one of {guards}."
        )
    return load_format(GENERAL)
