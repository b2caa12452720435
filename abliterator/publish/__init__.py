"""Publishes a verified checkpoint on the Hub: uploaded as private until it is complete.

A plan is made first, and none is made of a checkpoint whose bytes do not verify. Then: an offline
load by plain transformers in a fresh process; a private repository; exactly the planned files in
one commit; the hashes of what arrived read back; and only then, if requested, public. After any
failure, the same command continues where it stopped. An adapter is published in the same way, to a
repository of its own, and loaded by PEFT.

    plan = plan_publish(base, out / "checkpoint", Target("me/Llama-3.2-1B-Instruct-abliterated"))
    done = publish(plan)
    publish(plan_adapter(plan, out / "adapter", Target("me/Llama-3.2-1B-abliterated-LoRA")))

The token is the Hub library's own business (`HF_TOKEN`, or `hf auth login`): it is never an
argument here, and no message holds it.
"""

from abliterator.publish._files import PlannedFile
from abliterator.publish._plan import (
    Folders,
    Gating,
    PlanSummary,
    PublishPlan,
    Target,
    plan_adapter,
    plan_publish,
)
from abliterator.publish._publish import Published, publish

__all__ = [
    "Folders",
    "Gating",
    "PlanSummary",
    "PlannedFile",
    "PublishPlan",
    "Published",
    "Target",
    "plan_adapter",
    "plan_publish",
    "publish",
]
