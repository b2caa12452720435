"""What the card of a checkpoint states of it."""

from __future__ import annotations

from pathlib import Path


def stated_base(folder: Path) -> tuple[str, ...]:
    """Ids of the models that the folder's README.md names as `base_model`; empty where it does not.

    A card that cannot be read states nothing.
    """
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        stated = (metadata_load(folder / "README.md") or {}).get("base_model")
    except (OSError, ValueError, YAMLError):
        return ()
    stated = stated if isinstance(stated, list) else [stated]
    return tuple(name for name in stated if isinstance(name, str))
