"""config.json of an edited checkpoint: the base's, but for what would be false of it now."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

CONFIG_ENTRY = "abliterator"
"""Key under which config.json says who edited the weights; loaders keep it and do not read it."""

# Where save_pretrained had loaded the base from: of the edited model it would be false.
_FALSE_NOW = {"_name_or_path", CONFIG_ENTRY}


def edited_config(
    base: Mapping[str, Any], made_by: Mapping[str, str], *, without: Collection[str] = ()
) -> str:
    """The one text that config.json of an edited checkpoint may have.

    All keys of the base stand in their order, `_name_or_path` left out; the last one is
    `abliterator`.

    Args:
        base: the base's config.json, parsed.
        made_by: what the entry `abliterator` says.
        without: further keys of the base that the edit made false.
    """
    kept = {key: value for key, value in base.items() if key not in _FALSE_NOW.union(without)}
    return json.dumps({**kept, CONFIG_ENTRY: dict(made_by)}, indent=2) + "\n"
