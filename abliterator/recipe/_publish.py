"""What a checkpoint has to measure before it may be published."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from abliterator.recipe._section import Section

Share = Annotated[float, Field(ge=0, le=1)]


class Requirements(Section):
    """Limits of measured figures; each is checked where it is given."""

    refusal_at_most: Share | None = None
    """Share of held-out target prompts that the edited model refuses."""
    kl_at_most: Annotated[float, Field(ge=0)] | None = None
    """KL(base, edited) of the first answer token on neutral prompts, nats."""
    benchmark_loss_at_most: Share | None = None
    """Loss of the edited model on each benchmark, in units of its metric."""


class Publish(Section):
    """What `abliterator publish` requires; it changes no weight and no score."""

    require: Requirements = Requirements()
    """Limits that stop an upload: `{refusal_at_most: 0.1, kl_at_most: 0.1}`."""
