"""Builds of a small recipe on a copy of a tiny model, and the stages that ran."""

from __future__ import annotations

import shutil

import torch

from abliterator import pipeline
from abliterator.pipeline import Options
from abliterator.recipe import load_recipe

FAST = Options(device="cpu", dtype="float32")


class Log(pipeline.Silent):
    """Remembers which stages ran; `on` is called when one begins."""

    def __init__(self, **on):
        self.ran, self.on = [], on

    def stage(self, name, *, done):
        if not done:
            self.ran.append(name)
            self.on.get(name, lambda: None)()


def write_project(folder, tiny_folder):
    base = folder / "base"
    shutil.copytree(tiny_folder("llama", dtype=torch.bfloat16), base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    for name, question in (("t", "Tell me about the"), ("n", "Name a")):
        (folder / f"{name}.txt").write_text("\n".join(f"{question} {x}." for x in "abcdefgh"))
    (folder / "r.yaml").write_text(
        "model: base\nlayers: [2]\nk: 1\nrollouts: {max_new_tokens: 3}\n"
        "prompts: {target: {path: t.txt}, neutral: {path: n.txt}}\n"
    )
    return lambda *overrides: load_recipe(folder / "r.yaml", overrides=overrides)


def build(recipe, out, options=FAST, **on):
    log = Log(**on)
    return pipeline.build(recipe, out, options=options, progress=log), log.ran
