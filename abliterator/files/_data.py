"""Data files that come with the package."""

from __future__ import annotations

from importlib.resources import files
from typing import Any


def package_yaml(package: str, name: str) -> Any:
    """The values of a YAML file beside the code of `package`."""
    import yaml

    text = files(package).joinpath(name).read_text(encoding="utf-8")
    # the same loader in C, where it was built, reads a large file in a tenth of the time
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
