"""Protection of API keys: masked in texts of servers, never sent to another origin."""

from __future__ import annotations

import base64
import ipaddress
import os
from collections.abc import Iterator
from itertools import groupby
from urllib.parse import quote, urlsplit

from abliterator.recipe import ServerSettings

MASK = "[key]"
SHARED = 12  # consecutive characters of a key, or of an encoding of it, that are masked


def redacted(text: str, settings: ServerSettings) -> str:
    """The text without the key that `settings` name, which some servers quote back.

    Masked are runs of 12 or more characters of the key as it is, in base64, in hexadecimal digits,
    and percent-encoded; a shorter key is masked where it stands whole.
    """
    key = os.environ.get(settings.api_key_env or "", "").strip()
    if not key or not text:
        return text
    masked = bytearray(len(text))
    for form in set(_forms(key)):
        width = min(SHARED, len(form))
        pieces = {form[i : i + width] for i in range(len(form) - width + 1)}
        for start in range(len(text) - width + 1):
            if text[start : start + width] in pieces:
                masked[start : start + width] = b"\1" * width
    runs = groupby(zip(text, masked, strict=True), key=lambda pair: pair[1])
    return "".join(MASK if is_masked else "".join(c for c, _ in run) for is_masked, run in runs)


def warn_of_plain_http(url: str, key_variable: str | None, *, name: str) -> str | None:
    """A warning where a key would go over plain http to another machine, else None.

    Args:
        url: address of the server.
        key_variable: environment variable that holds the key; None where no key is sent.
        name: of the recipe's key that holds the address.
    """
    parts = urlsplit(url)
    if key_variable is None or parts.scheme != "http" or is_loopback(parts.hostname or ""):
        return None
    return (
        f"The key in ${key_variable} and all texts go unencrypted to {parts.hostname}: `{name}` is "
        "http, not https."
    )


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of an address: what two addresses of one server share."""
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or default


def _forms(key: str) -> Iterator[str]:
    data = key.encode()
    yield key
    if len(key) < SHARED:
        return  # encodings of a short key may occur in any text
    yield from (key[::-1], quote(key, safe=""), data.hex(), data.hex().upper())
    for offset in range(3):  # text before the key shifts its base64 by 0, 1 or 2 bytes
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(b"\0" * offset + data).decode().rstrip("=")
            yield text[(0, 2, 3)[offset] :]


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
