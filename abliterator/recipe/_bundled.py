"""The recipes that come with the package, by name."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from abliterator.files import read_text

EMBEDDED = "embedded:"  # begins the path of a prompt file that comes with the package


class BundledRecipe(NamedTuple):
    """A recipe that comes with the package, and what its comment says.

    Attributes:
        name: as `abliterator build` takes it.
        path: of its file.
        model: Hub id, or `embedded:demo`.
        needs: hardware, size of the weights, and access.
    """

    name: str
    path: Path
    model: str
    needs: str


def bundled_folder() -> Path:
    """The folder of the package's recipes: in a wheel abliterator/data/recipes, else recipes."""
    package = Path(str(files("abliterator")))
    installed = package / "data" / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def bundled_recipes() -> list[BundledRecipe]:
    """All recipes of the package, by name."""
    return [_described(path) for path in sorted(bundled_folder().glob("*.yaml"))]


def _described(path: Path) -> BundledRecipe:
    text = read_text(path)
    model = re.search(r"^model: (\S+)", text, flags=re.MULTILINE)
    hardware = re.search(r"^# Hardware: +(.+)\n((?:#            .*\n)*)", text, re.MULTILINE)
    needs = hardware[1].partition(":")[0].rstrip(".") if hardware else ""
    gated = ", access on the Hub" if hardware and "gated" in hardware[2] else ""
    return BundledRecipe(path.stem, path, model[1] if model else "", needs + gated)
