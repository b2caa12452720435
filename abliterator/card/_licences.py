"""Terms of the base's licence that the card of a derived model must state."""

from __future__ import annotations

from abliterator.card._markdown import Markdown

_LLAMA = {
    "llama2": ("Llama 2", "LLAMA 2", None),
    "llama3": ("Meta Llama 3", "Meta Llama 3", "Llama 3"),
    "llama3.1": ("Llama 3.1", "Llama 3.1", "Llama"),
    "llama3.2": ("Llama 3.2", "Llama 3.2", "Llama"),
    "llama3.3": ("Llama 3.3", "Llama 3.3", "Llama"),
    "llama4": ("Llama 4", "Llama 4", "Llama"),
}
_GEMMA = Markdown(
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms. Whoever passes this model on passes those terms on with it, their "
    "prohibited uses included. Its files were modified: see *What was removed*."
)


def obligations(license_id: str | None) -> list[Markdown]:
    """The paragraphs that a licence requires on the card; most require none."""
    normalised = (license_id or "").lower()
    if normalised in _LLAMA:
        return [_llama(*_LLAMA[normalised])]
    return [_GEMMA] if normalised == "gemma" else []


def with_license(card: str, license_id: str) -> str:
    """The text of a card with a licence in its header, where it has none."""
    from huggingface_hub import ModelCard

    parsed = ModelCard(card, ignore_metadata_errors=False)
    parsed.data["license"] = parsed.data.get("license") or license_id
    return str(parsed)


def stated_license(card: str) -> str | None:
    """The licence in the header of a card, anybody's; None where none can be read."""
    from yaml import YAMLError, safe_load

    if not card.startswith("---\n"):
        return None
    try:
        head = safe_load(card.split("\n---\n", 1)[0])
    except (YAMLError, ValueError, RecursionError):
        return None
    stated = head.get("license") if isinstance(head, dict) else None
    return stated if isinstance(stated, str) else None


def _llama(family: str, of_license: str, prefix: str | None) -> Markdown:
    notice = (
        f"{family} is licensed under the {of_license} Community License, Copyright © Meta "
        "Platforms, Inc. All Rights Reserved. Its Acceptable Use Policy holds for this model too."
    )
    if prefix is None:
        return Markdown(notice)
    built = "Built with Meta Llama 3" if family == "Meta Llama 3" else "Built with Llama"
    return Markdown(
        f"**{built}.** {notice} Whoever passes this model on includes a copy of that licence, "
        f'shows "{built}", and begins its name with "{prefix}".'
    )
