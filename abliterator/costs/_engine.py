"""Answers of an engine such as vLLM: assumed shares of what its devices do together."""

from __future__ import annotations

from abliterator.costs._passes import Work

# An engine takes so many seconds to start beside reading the weights, and reaches this share of
# what its devices do together.
_START, _SHARE = 90.0, 0.7
# It captures its steps, so that what eager code adds to products does not count.
_EAGER = ("block_overhead", "pass_overhead", "step_overhead", "stream")


def engine_start(work: Work) -> float:
    """Seconds in which an engine starts and reads the weights."""
    return _START + work.shape.stored / work.machine.disk_read


def on_engine(work: Work, devices: int) -> Work:
    """The same model in an engine on several such devices."""
    machine, faster = work.machine, devices * _SHARE
    products = (t.model_copy(update={"seconds": t.seconds / faster}) for t in machine.products)
    rates = {"products": tuple(products), "bandwidth": machine.bandwidth * faster}
    changed = machine.model_copy(update=rates | dict.fromkeys(_EAGER, 0.0))
    return Work(work.shape, changed)
