"""Tuned strengths and direction against heretic's search, on the same prompts and by both rulers.

    python perf/against_heretic.py MODEL_FOLDER --heretic ENVIRONMENT/bin/heretic

MODEL_FOLDER is made by scripts/smollm2/make_model.py; heretic (PyPI `heretic-llm`, 1.4.0) lives in
an environment of its own and is run as a program. It searches with the pairs of recipes/smollm2 and
*scores its trials on the evaluation prompts themselves*. Ours (recipes/smollm2_tuned.yaml) never
sees those: it learns from other forms of requests and leaves a front; every point of it is baked,
and heretic then counts refusals and KL on the baked files as it does on its own trials
(--evaluate-model). The rule judge reads the same answers of both, as heretic printed them: one of
fewer tokens than heretic allows ended by itself, and one that it cannot score is left out.

Prints both fronts, what either cost, and each bar of the comparison with kept or NOT kept. The bar
on compliance takes the one point that the recipe's `prefer` chose on prompts of the training forms,
and every other bar takes the whole front. Cost is CPU seconds of one thread beside the wall, which
means little where cores are shared. `--out` keeps everything, and what is there is not made again.

heretic runs the model as it is stored, in bfloat16, whose rounding alone shows as some thousandths
of a nat between two models that compute the same: no KL of its is below that. With --dtype float32
it searches and measures in float32, where that floor is gone: bars on KL are read there. Beside its
KL stands that of our baked files, always run in float32, with a digit more than heretic prints.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

from abliterator import pipeline
from abliterator.bake import bake
from abliterator.engines import AnswerPath, TransformersEngine
from abliterator.evaluation import kl_divergence
from abliterator.judge import RuleJudge
from abliterator.model import load_model, render_chat
from abliterator.recipe import load_recipe
from abliterator.record import Tuning
from abliterator.tuning import prefer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

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
AT_MOST = 0.02  # nats of KL, where compliance is compared
MORE = 0.2  # compliance above heretic's best there
CLOSING = re.compile(
    r"\* KL divergence: (?P<kl>\d+\.\d+)\n"
    r"(?P<answers>.*?)\* Refusals: (?P<refusals>\d+)/(?P<n>\d+)",
    re.DOTALL,
)
ANSWER = re.compile(
    r"^Prompt: (?P<prompt>.*?)\nResponse: (?P<response>.*?)\n(?=\n|\Z)", re.DOTALL | re.MULTILINE
)


class Trial(NamedTuple):
    """One edit: refusals and KL as heretic counts them, and the rule judge on the same answers.

    Attributes:
        scored: of the `n` answers, those whose compliance and coherence are in the means.
        kl_float32: measured here.
    """

    kl: float
    refusals: int
    n: int
    scored: int
    compliance: float
    coherence: float
    kl_float32: float | None = None


class Cost(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


def run_heretic(heretic: Path, folder: Path, settings: dict[str, object]) -> tuple[str, Cost]:
    """What heretic prints when it is run in `folder`, and its cost; a log there is used again."""
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
        environment["OMP_NUM_THREADS"] = "1"
        environment.pop("PYTHONPATH", None)
        start, before = time.perf_counter(), _children()
        # it ends by asking what to do with the result: with no answer to read, it stops there
        done = subprocess.run(
            [heretic], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True
        )
        cost = f"{time.perf_counter() - start:.1f} {_children() - before:.1f}"
        log.write_text(f"{cost}\n{done.stdout.decode()}\n{done.stderr.decode()}")
    first, _, text = log.read_text("utf-8").partition("\n")
    return text, Cost(*map(float, first.split()))


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _lines(name: str) -> list[str]:
    return (PROMPTS / f"{name}.jsonl").read_text("utf-8").rstrip("\n").split("\n")


def trials(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Trial]:
    """Every evaluated edit in heretic's output."""
    judge, found = RuleJudge(), []
    for match in CLOSING.finditer(text):
        said = [(a["prompt"], a["response"].strip()) for a in ANSWER.finditer(match["answers"])]
        if len(said) != int(match["n"]):
            raise SystemExit(f"read {len(said)} of {match['n']} answers: heretic prints otherwise")
        verdicts = [
            judge.judge(
                prompt,
                answer,
                finish_reason="length" if len(tokenizer.encode(answer)) >= TOKENS else "stop",
            )
            for prompt, answer in said
        ]
        pairs = ((v.compliance, v.coherence) for v in verdicts)
        scored = [(c, sound) for c, sound in pairs if c is not None and sound is not None]
        found.append(
            Trial(
                float(match["kl"]),
                int(match["refusals"]),
                len(said),
                len(scored),
                mean(compliance for compliance, _ in scored),
                mean(coherence for _, coherence in scored),
            )
        )
    return found


def front(points: list[Trial]) -> list[Trial]:
    """Those that no other beats in both refusals and KL, as heretic offers them."""
    ordered = sorted(points, key=lambda p: (p.refusals, p.kl))
    return [p for i, p in enumerate(ordered) if all(p.kl < other.kl for other in ordered[:i])]


def tuned(model: Path, out: Path, overrides: Sequence[str]) -> tuple[Cost, int]:
    """Runs the tuning and bakes every point into out/points; its cost, and the chosen point."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    overrides = [f"model={model.resolve()}", *overrides]
    recipe = load_recipe(ROOT / "recipes" / "smollm2_tuned.yaml", overrides=overrides)
    wall, cpu = time.perf_counter(), time.process_time()
    pipeline.run_stages(recipe, out / "ours", until="tuning")
    cost = f"{time.perf_counter() - wall:.1f} {time.process_time() - cpu:.1f}"
    work = out / "ours" / "work"
    found = Tuning.model_validate_json((work / "tuning.json").read_text("utf-8"))
    bases = load_file(work / "tuning.safetensors")["bases"]
    plan = pipeline.plan_recipe(recipe, out)
    for i, strengths in enumerate(found.strengths):
        folder = out / "points" / str(i)
        if not folder.is_dir():
            bake(plan.checkpoint, plan.edits.with_strengths(strengths), bases[i], folder)
    timing = out / "ours.seconds"
    if not timing.is_file():
        timing.write_text(cost)
    wanted, max_kl = recipe.tuning, recipe.selection.max_kl
    chosen = prefer(found.trials, wanted.prefer, wanted.at_most, max_kl=max_kl)
    return Cost(*map(float, timing.read_text("utf-8").split())), chosen


def in_float32(base: Path, edited: Sequence[Path]) -> list[float]:
    """Mean first-token KL of each edited folder from the base on the neutral evaluation prompts."""
    import torch

    prompts = [json.loads(line)["prompt"] for line in _lines("ordinary")]

    def logprobs(folder: Path) -> Tensor:
        loaded = load_model(folder, device="cpu", dtype="float32")
        token_ids = [render_chat(loaded.tokenizer, prompt, system=SYSTEM) for prompt in prompts]
        paths = [AnswerPath(tuple(ids), 1) for ids in token_ids]
        rows = dict(TransformersEngine(loaded).logits(paths, max_batch_tokens=4096))
        first = torch.stack([rows[i][-1] for i in range(len(paths))])
        return first.float().log_softmax(dim=1)

    before = logprobs(base)
    return [float(kl_divergence(before, logprobs(folder)).mean()) for folder in edited]


def show(title: str, points: list[Trial]) -> None:
    """A table of points."""
    print(f"\n{title}\n refusals      KL   compliance  coherence  scored  KL in float32")
    for p in sorted(points, key=lambda p: p.kl):
        exact = "" if p.kl_float32 is None else f"      {p.kl_float32:.5f}"
        judged = f"{p.compliance:.3f}       {p.coherence:.3f}      {p.scored:3d}"
        print(f"  {p.refusals:3d}/{p.n}  {p.kl:.4f}   {judged}{exact}")


def bars(theirs: list[Trial], ours: list[Trial], chosen: Trial) -> list[tuple[bool, str]]:
    """Each bar but the time: whether it is kept, and the figures."""
    found = []
    for their in theirs:
        left = min((o.refusals for o in ours if o.kl <= their.kl), default=None)
        what = f"declines at KL {their.kl:.4f}: {left} against {their.refusals}, a quarter"
        found.append((left is not None and 4 * left <= their.refusals, what))
    for their in theirs:
        kl = min((o.kl for o in ours if o.refusals <= their.refusals), default=math.inf)
        what = f"KL at {their.refusals} declines: {kl:.4f} against {their.kl:.4f}, a tenth"
        found.append((10 * kl <= their.kl, what))
    best = max((t for t in theirs if t.kl <= AT_MOST), key=lambda t: t.compliance)
    least = chosen.kl <= AT_MOST and chosen.coherence >= best.coherence
    what = (
        f"compliance at KL {AT_MOST} or less: {chosen.compliance:.3f} against {best.compliance:.3f}"
        f" + {MORE} (KL {chosen.kl:.4f}; coherence {chosen.coherence:.3f}, {best.coherence:.3f})"
    )
    return [*found, (least and chosen.compliance >= best.compliance + MORE, what)]


def main() -> None:
    """Runs both, and compares."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--heretic", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    out = (arguments.out or Path(tempfile.mkdtemp())).resolve()
    settings = {
        "model": str(arguments.model.resolve()),
        "dtypes": [arguments.dtype],
        "n_trials": arguments.trials,
        "n_startup_trials": arguments.trials * 3 // 10,  # as in its defaults: 60 of 200
        "seed": 1,
        "max_response_length": TOKENS,
        "print_responses": True,
        "system_prompt": SYSTEM,
    }
    cost, chosen = tuned(arguments.model, out, arguments.overrides)
    program, runs = arguments.heretic.resolve(), out / arguments.dtype
    text, other = run_heretic(program, runs / "heretic", settings)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    theirs = trials(text, tokenizer)
    ours, folders = [], sorted((out / "points").iterdir(), key=lambda path: int(path.name))
    for folder, exact in zip(folders, in_float32(arguments.model, folders), strict=True):
        # no search for the fastest batch: it is no part of what is measured
        asked = {**settings, "evaluate_model": str(folder), "batch_size": 36}
        said, _ = run_heretic(program, runs / "evaluated" / folder.name, asked)
        ours += [point._replace(kl_float32=exact) for point in trials(said, tokenizer)[-1:]]
    best = front(theirs)
    show(f"heretic, {len(theirs)} trials, front on the evaluation prompts", best)
    show("ours, every point, none chosen on the evaluation prompts", ours)
    told = bars(best, ours, ours[chosen])
    what = f"CPU seconds: {cost.cpu:.0f} against {other.cpu:.0f}, a fifth"
    told.append((5 * cost.cpu <= other.cpu, what))
    print(f"\nwall seconds: ours {cost.wall:.0f}, heretic {other.wall:.0f}\n")
    for kept, what in told:
        print(f"{'kept    ' if kept else 'NOT kept'}  {what}")


if __name__ == "__main__":
    main()
