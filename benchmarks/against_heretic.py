"""Tuned strengths and direction against heretic's search, on the same prompts and by both rulers.

    python benchmarks/against_heretic.py MODEL_FOLDER --heretic ENVIRONMENT/bin/heretic

MODEL_FOLDER is made by recipes/smollm2/make_model.py; heretic (PyPI `heretic-llm`, 1.4.0) lives in
an environment of its own and is run as a program. It searches with the pairs of recipes/smollm2 and
*scores its trials on the evaluation prompts themselves*. Ours (recipes/smollm2_tuned.yaml) never
sees those: it learns from other forms of requests and leaves a front; every point of it is baked,
and heretic then counts refusals and KL on the baked files as it does on its own trials
(--evaluate-model). The rule judge reads the same answers of both, as heretic printed them.

Prints both fronts and both walls. `--out` keeps everything, and what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from abliterator import pipeline
from abliterator.bake import bake
from abliterator.judge import RuleJudge
from abliterator.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "recipes" / "smollm2"
SETS = {
    "good_prompts": "answered",
    "bad_prompts": "declined",
    "good_evaluation_prompts": "ordinary",
    "bad_evaluation_prompts": "declined_heldout",
}
SYSTEM = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the template's own
)
TOKENS = 20
CLOSING = re.compile(
    r"\* KL divergence: (?P<kl>\d+\.\d+)\n"
    r"(?P<answers>.*?)\* Refusals: (?P<refusals>\d+)/(?P<n>\d+)",
    re.DOTALL,
)
ANSWER = re.compile(
    r"^Prompt: (?P<prompt>.*?)\nResponse: (?P<response>.*?)\n(?=\n|\Z)", re.DOTALL | re.MULTILINE
)


class Trial(NamedTuple):
    """One edit: refusals and KL as heretic counts them, and the rule judge on the same answers."""

    kl: float
    refusals: int
    n: int
    compliance: float
    coherence: float


def run_heretic(heretic: Path, folder: Path, settings: dict[str, object]) -> tuple[str, float]:
    """What heretic prints when it is run in `folder`, and seconds; a log there is used again."""
    log = folder / "heretic.log"
    if not log.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        for section, name in SETS.items():
            prompts = [json.loads(line)["prompt"] for line in _lines(name)]
            (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
            lines += [f"[{section}]", f'dataset = "{name}.txt"']
        (folder / "config.toml").write_text("\n".join(lines) + "\n")
        environment = {**os.environ, "COLUMNS": "100000", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        start = time.perf_counter()
        # it ends by asking what to do with the result: with no answer to read, it stops there
        done = subprocess.run(
            [heretic], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True
        )
        seconds = time.perf_counter() - start
        log.write_text(f"{seconds:.1f}\n{done.stdout.decode()}\n{done.stderr.decode()}")
    first, _, text = log.read_text().partition("\n")
    return text, float(first)


def _lines(name: str) -> list[str]:
    return (PROMPTS / f"{name}.jsonl").read_text().splitlines()


def trials(text: str) -> list[Trial]:
    """Every evaluated edit in heretic's output."""
    judge, found = RuleJudge(), []
    for match in CLOSING.finditer(text):
        said = [
            judge.judge(a["prompt"], a["response"].strip(), finish_reason="length")
            for a in ANSWER.finditer(match["answers"])
        ]
        if len(said) != int(match["n"]):
            raise SystemExit(f"read {len(said)} of {match['n']} answers: heretic prints otherwise")
        found.append(
            Trial(
                float(match["kl"]),
                int(match["refusals"]),
                len(said),
                mean(v.compliance or 0.0 for v in said),
                mean(v.coherence or 0.0 for v in said),
            )
        )
    return found


def front(points: list[Trial]) -> list[Trial]:
    """Those that no other beats in both refusals and KL, as heretic offers them."""
    ordered = sorted(points, key=lambda p: (p.refusals, p.kl))
    return [p for i, p in enumerate(ordered) if all(p.kl < other.kl for other in ordered[:i])]


def tuned(model: Path, out: Path) -> float:
    """Runs the tuning and bakes every point of it into out/points; returns the tuning's seconds."""
    from safetensors.torch import load_file

    overrides = [f"model={model.resolve()}"]
    recipe = load_recipe(ROOT / "recipes" / "smollm2_tuned.yaml", overrides=overrides)
    start = time.perf_counter()
    pipeline.run_stages(recipe, out / "ours", until="tuning")
    seconds = time.perf_counter() - start
    work = out / "ours" / "work"
    found = json.loads((work / "tuning.json").read_text())
    bases = load_file(work / "tuning.safetensors")["bases"]
    plan = pipeline.plan_recipe(recipe, out)
    for i, strengths in enumerate(found["strengths"]):
        folder = out / "points" / str(i)
        if not folder.is_dir():
            bake(plan.checkpoint, plan.edits.with_strengths(strengths), bases[i], folder)
    timing = out / "ours.seconds"
    if not timing.is_file():
        timing.write_text(f"{seconds:.1f}")
    return float(timing.read_text())


def show(title: str, points: list[Trial]) -> None:
    """A table of points."""
    print(f"\n{title}\n refusals      KL   compliance  coherence")
    for p in sorted(points, key=lambda p: p.kl):
        print(f"  {p.refusals:3d}/{p.n}  {p.kl:.4f}   {p.compliance:.3f}       {p.coherence:.3f}")


def main() -> None:
    """Runs both, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--heretic", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    out = (arguments.out or Path(tempfile.mkdtemp())).resolve()
    settings = {
        "model": str(arguments.model.resolve()),
        "n_trials": arguments.trials,
        "n_startup_trials": arguments.trials * 3 // 10,  # as in its defaults: 60 of 200
        "seed": 1,
        "max_response_length": TOKENS,
        "print_responses": True,
        "system_prompt": SYSTEM,
    }
    seconds = tuned(arguments.model, out)
    text, other = run_heretic(arguments.heretic.resolve(), out / "heretic", settings)
    theirs = trials(text)
    ours = []
    for folder in sorted((out / "points").iterdir()):
        asked = {**settings, "evaluate_model": str(folder)}
        said, _ = run_heretic(arguments.heretic.resolve(), out / "evaluated" / folder.name, asked)
        ours += trials(said)[-1:]
    show(f"heretic, {len(theirs)} trials, front on the evaluation prompts", front(theirs))
    show("ours, every point, none chosen on the evaluation prompts", ours)
    print(f"\nwall: heretic {other:.0f} s, ours {seconds:.0f} s ({seconds / other:.2f} x)")


if __name__ == "__main__":
    main()
