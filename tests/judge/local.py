"""Local judges on tiny models, and an engine that gives a published output the highest score."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch

from abliterator.engines import TransformersEngine
from abliterator.judge import Answered, JudgeModel, LocalJudge, load_format
from abliterator.model import Limits, load_model

TEMPLATES = Path(__file__).parent / "templates"
MODEL = JudgeModel("org/tiny", None, "0" * 64, "float32")


def roomy(folder, to, context=8192):
    """A copy of a tiny checkpoint that reads a whole rubric, or as much as `context` says."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["max_position_embeddings"] = context
    (to / "config.json").write_text(json.dumps(config))
    return to


def tiny_engine(folder, to, **options):
    return TransformersEngine(
        load_model(roomy(folder, to, **options), device="cpu", dtype="float32")
    )


def with_template(tokenizer, name):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None if name is None else (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


class Published:
    """An engine to which one output is far more probable than all others: that of a model card."""

    def __init__(self, tokenizer, output, context=None):
        self.tokenizer, self.output, self.prompts = tokenizer, output, []
        self.limits, self.stop_ids = Limits(context), (2,)

    def log_likelihoods(self, prompts, continuations, **options):
        self.prompts += prompts
        texts = [self.tokenizer.decode(ids) for ids in continuations]
        row = [-1.0 if text == self.output else -50.0 for text in texts]
        return torch.tensor([row] * len(prompts), dtype=torch.float64)


def judge_of(engine, cache, name="labels", model=MODEL):
    return LocalJudge(
        model, load_format(name), use_engine=lambda function: function(engine), cache=cache
    )


def answers(n):
    """Answers of different lengths; every fifth is an earlier one again."""
    texts = ["It runs through the old town. " * (i % 7 + 1) for i in range(n)]
    return [Answered(f"Which river is number {i - i % 5 // 4}?", texts[i]) for i in range(n)]
