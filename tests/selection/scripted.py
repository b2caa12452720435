"""Candidates and answers by script, and a sweep over them without a model that answers."""

from dataclasses import replace

import torch
from abliterator.generation import Answer

from abliterator.directions import Directions, Place
from abliterator.record import Verdict
from abliterator.selection import Asked, Candidate, Gates, Pool, Search, _scores, _sweep

PROMPTS = [[4, 9, 17, 30], [5, 9, 31], [4, 8, 60, 61]]


def candidate(layer, bypass=0.0, kl=0.05, induce=1.0):
    return Candidate(layer=layer, bypass=bypass, kl=kl, induce=induce)


def said(products):
    """Judged answers with these products."""
    return _scores.Judged(
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


def ask(subject, n):
    """The subject with so many held-out prompts."""
    return replace(subject, held_out=Asked([str(i) for i in range(n)], [[4]] * n))


def sweep(subject, n, gates=Gates(), n_judged=2, prompts=2, schedule=None):  # noqa: B008
    search = Search(gates=gates, survivors=n_judged)
    return _sweep.sweep_places(
        ask(subject, prompts),
        None,
        pool(*range(1, n + 1)),
        replace(search, schedule=schedule) if schedule else search,
        least=1,
        stackable=1,
        on_step=lambda _: None,
    )
