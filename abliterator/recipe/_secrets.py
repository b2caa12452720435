"""Rejects secrets in recipes, which are published with the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic_core import PydanticCustomError

# Compared without case, hyphens and underscores.
_SECRET_NAMES = {
    *("apikey", "xapikey", "key", "token", "accesstoken", "authtoken", "bearertoken", "hftoken"),
    *("secret", "clientsecret", "secretkey", "accesskey", "password", "passwd", "passphrase"),
    *("auth", "authorization", "proxyauthorization", "bearer", "credential", "credentials"),
    *("cookie", "cookies", "setcookie"),
}
# How keys of well-known services begin.
_SECRET_VALUE = re.compile(r"\s*(sk-|sk_|hf_|gsk_|ghp_|xai-|AIza|AKIA|Bearer\s|Basic\s)")


def plain_url(value: str) -> str:
    """An http or https address without credentials: no user, password, query or fragment.

    Raises:
        ValueError: if it is none. The error does not quote it where it may hold a secret.
    """
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("must be an http or https URL") from None
    if parts.username or parts.password or parts.query or parts.fragment or "@" in parts.netloc:
        raise PydanticCustomError(
            "secret",
            "must hold no credentials: no user, password, query or fragment; a key is read from "
            "an environment variable",
        )
    if parts.scheme not in {"http", "https"} or not host:
        raise ValueError("must be an http or https URL")
    return value.rstrip("/")


def without_secrets(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings unchanged, if none of them may be a secret.

    Raises:
        ValueError: if one of them, at any depth, is named or looks like a key or password. The
            error names it and does not quote its value.
    """
    for name, value in _leaves(values):
        plain = re.sub(r"[-_\s]", "", name.rsplit(".", 1)[-1]).lower()
        is_secret = isinstance(value, str) and _SECRET_VALUE.match(value) is not None
        if plain in _SECRET_NAMES or is_secret:
            raise PydanticCustomError(
                "secret",
                "cannot hold `{name}`, which may be a secret: the recipe is published. A key is "
                "read from an environment variable",
                {"name": name},
            )
    return values


def _leaves(values: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every entry at any depth; items of a list have the list's name."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            name = f"{where}.{key}" if where else str(key)
            yield name, value
            yield from _leaves(value, name)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield where, value
            yield from _leaves(value, where)
