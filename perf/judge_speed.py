"""Wall time of judging against the least that latency and concurrency allow.

    python perf/judge_speed.py [--calls 500] [--latency 0.25] [--concurrency 8]

A server on loopback speaks OpenAI's protocol and answers after `latency` seconds (the one that the
tests use). Prints the ratio of the wall to calls x latency / concurrency, without faults and with
faults in 18 % of the replies, and whether both runs gave the same verdicts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from abliterator.judge import Answered, Judgement, OpenAIJudge
from abliterator.recipe import JudgeSettings
from tests.helpers.judge_server import GRADES, JudgeServer

FAULTS = {"429": 0.05, "500": 0.05, "drop": 0.02, "slow": 0.02, "malformed": 0.01, "fenced": 0.01}
FAULTS |= {"html": 0.01, "content_filter": 0.01}


def run(
    calls: int, latency: float, concurrency: int, faults: dict[str, float]
) -> tuple[list[Judgement], float]:
    """The verdicts of `calls` answers, and seconds."""
    words = list(GRADES)
    answers = [
        Answered(f"Question {i}?", f"{words[i % len(words)]} that is answer {i}.")
        for i in range(calls)
    ]
    with (
        JudgeServer(faults=faults, latency=latency) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        settings = JudgeSettings(
            kind="openai",
            base_url=server.url,
            model="any",
            api_key_env=None,
            concurrency=concurrency,
            timeout=5.0,
            rejudge=0.0,
        )
        judge = OpenAIJudge(settings, cache=Path(folder) / "cache.sqlite")
        start = time.perf_counter()
        return judge.judge_all(answers), time.perf_counter() - start


def main() -> None:
    """Prints both ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--latency", type=float, default=0.25)
    parser.add_argument("--concurrency", type=int, default=8)
    given = parser.parse_args()
    least = given.calls * given.latency / given.concurrency
    verdicts = []
    for name, faults in (("faultless", {}), ("faults", FAULTS)):
        found, seconds = run(given.calls, given.latency, given.concurrency, faults)
        verdicts.append(found)
        unscored = sum(not v.is_scored for v in found)
        print(f"{name:10s} {seconds:6.2f} s  {seconds / least:.2f} x  {unscored} unscored")
    print(f"same verdicts: {verdicts[0] == verdicts[1]}")


if __name__ == "__main__":
    main()
