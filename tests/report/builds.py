"""Builds to make reports of, and what a browser finds in a page."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

from abliterator.record import Completion, TensorEdit, Verdict
from abliterator.report import Build, SamplePair
from tests.card.records import SHA, demo_record, groups, selection, side_effects, tuning

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    "{{ 7 * 7 }}\u2028'\"&amp;<!--"
)


def answers(n: int, text: str = "an answer"):
    """Answers and verdicts of both sides to n prompts."""
    for index in range(n):
        for side, refuses in (("base", True), ("edited", index % 4 == 0)):
            yield (
                Completion(
                    set="target",
                    side=side,
                    index=index,
                    prompt=f"prompt {index} {text}",
                    response=f"thought {text}" + f"{'no' if refuses else 'yes'} {index} {text}",
                    finish_reason="stop",
                    n_tokens=9,
                    answer_start=len(f"thought {text}"),
                ),
                Verdict(
                    set="target",
                    side=side,
                    index=index,
                    compliance=0.0 if refuses else 1.0,
                    coherence=1.0,
                    refused=refuses,
                    truncated=False,
                    reasons=(f"refusal: {text}",),
                    kind="refused" if refuses else "complied",
                ),
            )


def edit(name: str) -> TensorEdit:
    return TensorEdit(
        name=name,
        file="model.safetensors",
        component="mlp",
        layer=1,
        axis=0,
        dtype="BF16",
        shape=(4, 4),
        k=1,
        strength=0.5,
        leak=0.5000001,
        sha256_before=SHA,
        sha256_after=SHA,
    )


def build(
    name: str = "demo", *, n: int = 8, text: str = "plain", model: str | None = None
) -> Build:
    """A build with every part; `text` stands wherever free text may."""
    record = demo_record().model_copy(update={"selection": selection(), "tuning": tuning()})
    grouping = groups()["target"][0].model_copy(update={"column": f"category {text}"})
    record = record.model_copy(
        update={"groups": {"target": (grouping,)}, "side_effects": side_effects()}
    )
    identity = record.model.model_copy(update={"id": model or f"org {text}"})
    recipe = {**record.recipe, "chat": {"system": text}}
    benchmarks = {f"task {text}": record.benchmarks["toy_facts"]}
    record = record.model_copy(
        update={"model": identity, "recipe": recipe, "benchmarks": benchmarks}
    )
    completions, verdicts = zip(*answers(n, text), strict=True)
    return Build(
        name=f"{name} {text}",
        record_text=record.model_dump_json(indent=1),
        answers=completions,
        verdicts=verdicts,
        by_rules=[v.model_copy(update={"kind": "partial"}) for v in verdicts[:2]],
        edits=[edit(f"model.layers.1 {text}")],
        changes={f"model.layers.1 {text}": 0.25},
        gates={"max_kl": 0.1, "min_induce": 0.0},
        cosines=[[1.0, 0.5], [0.5, 1.0]],
        groups={
            "target": {
                f"category {text}": ["knitting" if index % 2 else None for index in range(n)]
            }
        },
        flipped={f"task {text}": [SamplePair(3, f"none {text}", 0.0, 1.0, -2.0, -0.5)]},
    )


class Page(HTMLParser):
    """Tags in order, attributes, and the text of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.texts: list[str] = []
        self._script: dict[str, str | None] | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._script = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")
        self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self.scripts.append((self._script, data))
        else:
            self.texts.append(data)

    @property
    def data(self) -> str:
        """The JSON of the page."""
        return next(text for attributes, text in self.scripts if attributes.get("id") == "data")


def browser() -> str | None:
    """The path of an installed Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def written(folder: Path, html: str) -> str:
    """The address of a file with this text."""
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    return path.as_uri()
