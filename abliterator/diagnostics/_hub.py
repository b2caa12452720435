"""The Hugging Face Hub's client: where its token is, and one request."""

from __future__ import annotations

import os
from pathlib import Path

from abliterator.diagnostics._faults import described, without_home
from abliterator.diagnostics._report import Hub
from abliterator.files import read_text

# Variables in the order in which the client looks for a token.
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SECONDS = 10.0


def cache_folder() -> Path:
    """Where the client keeps models."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def hub(*, online: bool) -> Hub:
    """How the client is set up.

    The client's own search for a token is not used, since it may renew one over the network.

    Args:
        online: whether to ask the Hub once, with the token if there is one.
    """
    from huggingface_hub import constants

    token, place = _token()
    return Hub(
        endpoint=constants.ENDPOINT,
        token=place,
        offline=constants.is_offline_mode(),
        answer=_answer(constants.ENDPOINT, token) if online else None,
    )


def _token() -> tuple[str, str | None]:
    """The token and its place; an empty one without a place."""
    from huggingface_hub import constants

    for variable in _VARIABLES:
        if token := os.environ.get(variable, "").strip():
            return token, f"the variable {variable}"
    file = Path(constants.HF_TOKEN_PATH)
    if file.is_file() and (token := read_text(file).strip()):
        return token, without_home(str(file))
    return "", None


def _answer(endpoint: str, token: str) -> str:
    from huggingface_hub import get_session

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        response = get_session().get(f"{endpoint}/api/whoami-v2", headers=headers, timeout=_SECONDS)
    except Exception as error:  # noqa: BLE001 - of the client, of HTTP or of a proxy
        quoted = any(part in str(error) for part in token.split())  # an illegal header is quoted
        return type(error).__name__ if quoted else described(error)
    if response.status_code == 401:
        return "the token is not accepted" if token else "reached"
    if response.status_code == 200:
        return "reached, and the token is accepted"
    return f"HTTP status {response.status_code}"
