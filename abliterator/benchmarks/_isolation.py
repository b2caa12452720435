"""Isolation of lm-eval from its process: output, log levels, environment, templates; its seeds."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

# lm-eval's own defaults, so that its command line gives the same numbers.
PYTHON_SEED, OTHER_SEED = 0, 1234


@contextlib.contextmanager
def lm_eval_isolated() -> Iterator[None]:
    """Runs lm-eval silently, with templates in a sandbox; restores environment and log levels."""
    environment = dict(os.environ)  # before the imports, which set variables too
    try:
        with warnings.catch_warnings(action="ignore"):
            # before the redirection: on import they keep the stderr of that moment for their logs
            import datasets  # noqa: F401
            import lm_eval.utils  # noqa: F401
            import transformers  # noqa: F401

            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
                _errors_only(),
                _sandboxed_templates(),
            ):
                yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Logs nothing below an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """lm-eval renders templates in a plain Jinja environment, from which Python can be reached."""
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment

    original = lm_eval.utils.env
    sandbox = SandboxedEnvironment(
        undefined=original.undefined, keep_trailing_newline=original.keep_trailing_newline
    )
    sandbox.filters.update(original.filters)
    lm_eval.utils.env = sandbox
    try:
        yield
    finally:
        lm_eval.utils.env = original


@contextlib.contextmanager
def hub_offline() -> Iterator[None]:
    """Reads datasets from the cache only; else each tries the Hub several times before it fails.

    The libraries read HF_HUB_OFFLINE when they are imported, so it is set where they keep it.
    """
    names = ("datasets.config", "huggingface_hub.constants")
    places: list[Any] = [importlib.import_module(name) for name in names]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def seed_all() -> None:
    """Sets the seeds that lm-eval's command line sets, so that sampled answers repeat."""
    import numpy as np
    import torch

    random.seed(PYTHON_SEED)  # noqa: TID251  (lm-eval draws from the global generator)
    np.random.seed(OTHER_SEED)  # noqa: NPY002
    torch.manual_seed(OTHER_SEED)
