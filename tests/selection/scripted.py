"""Candidates and answers by script, and a sweep over them without a model that answers."""

from dataclasses import replace

import torch

from abliterator import recipe
from abliterator.directions import Directions, Place
from abliterator.engines import Answer
from abliterator.evaluation import JudgedAnswers, RenderedPrompts
from abliterator.record import Candidate, Verdict
from abliterator.selection import Pool, _sweep

PROMPTS = [[4, 9, 17, 30], [5, 9, 31], [4, 8, 60, 61]]


def candidate(layer, bypass=0.0, kl=0.05, induce=1.0):
    return Candidate(layer=layer, bypass=bypass, kl=kl, induce=induce)


def said(products):
    """Judged answers with these products."""
    return JudgedAnswers(
        tuple(Answer("", (1,) * 7, "stop") for _ in products),
        tuple(
            Verdict(
                set="target",
                side="edited",
                index=i,
                compliance=product,
                coherence=1.0,
                refused=product == 0,
                truncated=False,
                kind="complied" if product else "refused",
            )
            for i, product in enumerate(products)
        ),
    )


UNIT = Directions(torch.eye(32, dtype=torch.float64))


def pool(*layers):
    return Pool([Place(layer) for layer in layers], {-1: UNIT})


def ask(context, n):
    """The context with so many held-out prompts."""
    return replace(context, target=RenderedPrompts([str(i) for i in range(n)], [[4]] * n))


def sweep(context, n, n_judged=2, prompts=2, **settings):
    settings = {"rungs": (), **settings}
    return _sweep.sweep_places(
        ask(context, prompts),
        None,
        pool(*range(1, n + 1)),
        recipe.Selection(survivors=n_judged, **settings),
        least=1,
        stackable=1,
        on_step=lambda _: None,
    )
