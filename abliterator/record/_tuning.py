"""Results of tuning: an entry of the record, and work/tuning.json."""

from __future__ import annotations

from pydantic import AliasChoices, Field

from abliterator.record._measured import Estimate, Frozen


class Trial(Frozen):
    """Measurements of one tuned edit on held-out prompts.

    `kl_weight` and `scale` are the weight of the KL in the phase whose result it
    is, and the factor on its strengths; `kl` is nats per token along the base's answers,
    `cosine` how far the directions moved (the least singular value of Q_startᵀ Q; of modules with
    U and V of their own, the least cosine between U Vᵀ and that of the start).
    """

    kl_weight: float
    scale: float
    cosine: float
    kl: float
    kl_first_token: float
    refusal: Estimate | None
    compliance: Estimate | None
    coherence: Estimate | None
    product: Estimate | None
    on_front: bool = False


class Tuning(Frozen):
    """All trials, and which one is baked; records of 0.x had `lessons`, `points` and `taken`.

    Attributes:
        preference_pairs: target prompts that were learned from.
        trials: the first is the start edit itself, at the plan's strengths.
        strengths: of each trial by module path; left out of the record, for edits.json has those
            that were baked.
        selected: index of the trial that the recipe prefers; None before it is applied.
    """

    preference_pairs: int = Field(validation_alias=AliasChoices("preference_pairs", "lessons"))
    trials: tuple[Trial, ...] = Field(validation_alias=AliasChoices("trials", "points"))
    strengths: tuple[dict[str, float], ...] = ()
    selected: int | None = Field(None, validation_alias=AliasChoices("selected", "taken"))

    @property
    def has_dropouts(self) -> bool:
        """Whether some trials dropped out before they had answered all prompts."""
        asked = {trial.product.asked for trial in self.trials if trial.product}
        return len(asked) > 1
