"""Starts Python child processes with a safe import path and an environment without secrets.

A child imports nothing from the working folder, whatever lies there, and holds no token, key or
password that it does not need.

    subprocess.run(python_command("-m", "package"), env=child_environment(keep={"HF_TOKEN"}))
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping

HUB_TOKENS = frozenset({"HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"})
"""Variables by which the Hub's client is given a token."""

# A name of a variable of which a word ends so, or is one of these: OPENAI_API_KEY, MYTOKEN, GH_PAT.
_SECRET_WORD = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|COOKIE)S?(_|$)"
    r"|(^|_)(AUTH|PAT|PW)(_|$)"
)
_SECRET_PREFIXES = ("AWS_",)
_NO_SECRETS = frozenset({"HF_HUB_DISABLE_IMPLICIT_TOKEN"})
_PASSWORD_IN_ADDRESS = re.compile(r"://[^/@\s]*:[^/@\s]*@")


def python_command(*arguments: str) -> list[str]:
    """The command of a Python process that imports nothing from the working folder.

    Without -P, the folder in which `python -m` is run, or that of a script, comes before all
    installed packages: a file json.py beside a model would run.
    """
    return [sys.executable, "-P", *arguments]


def child_environment(
    changes: Mapping[str, str] | None = None,
    *,
    keep: Collection[str] = (),
    drop: Collection[str] = (),
) -> dict[str, str]:
    """This process's environment without secrets, for a child.

    Args:
        changes: variables to set, which go before those of this process.
        keep: names of secrets that the child needs.
        drop: names of further variables that hold secrets.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in keep or not (name in drop or _is_secret(name, value))
    }
    if "PYTHONPATH" in environment:
        # an empty entry, as in ":/opt/lib", stands for the working folder
        entries = environment.pop("PYTHONPATH").split(os.pathsep)
        if python_path := os.pathsep.join(filter(None, entries)):
            environment["PYTHONPATH"] = python_path
    # as -P, for the processes that the child starts
    return environment | {"PYTHONSAFEPATH": "1"} | dict(changes or {})


def _is_secret(name: str, value: str) -> bool:
    upper = name.upper()
    if upper in _NO_SECRETS:
        return False
    if upper.startswith(_SECRET_PREFIXES) or _SECRET_WORD.search(upper):
        return True
    # a proxy's password is needed to reach anything at all
    return not upper.endswith("_PROXY") and bool(_PASSWORD_IN_ADDRESS.search(value))
