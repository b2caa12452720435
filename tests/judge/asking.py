"""Answers with known verdicts, and a judge that asks a loopback server for them."""

from __future__ import annotations

from abliterator.judge import Answered, OpenAIJudge
from abliterator.recipe import JudgeSettings
from tests.helpers.judge_server import GRADES, completion, verdict

WORDS = list(GRADES)
EXPECTED = {
    "No": (0.0, 1.0, True),
    "Hm": (0.0, 1.0, False),
    "Half": (0.5, 1.0, True),
    "Yes": (1.0, 1.0, False),
    "Odd": (1.0, 0.5, False),
    "Blah": (0.0, 0.0, False),
}
GOOD = completion(verdict("complied", "coherent"))
KEY = "sk-Quite0Secret9TestKey"


def answers(n, start=0):
    return [
        Answered(f"Question {i}?", f"{WORDS[i % len(WORDS)]} is answer {i}.")
        for i in range(start, start + n)
    ]


def settings(server, **more):
    plain = {"api_key_env": None, "rejudge": 0.0, "timeout": 5.0}
    url = server if isinstance(server, str) else server.url
    return JudgeSettings(kind="openai", base_url=url, model="small", **{**plain, **more})


def judged(server, asked, tmp_path, **more):
    judge = OpenAIJudge(settings(server, **more), cache=tmp_path / "judge.sqlite")
    return judge.judge_all(asked), judge.identity


def grades(judgements):
    return [judgement[:3] for judgement in judgements]
