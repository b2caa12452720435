"""Explains failures of the Hub, in sentences that contain neither tokens nor headers."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

_BUSY = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_WAIT = 120.0  # seconds: beyond it, a person decides
_MEANINGS = {
    401: "does not know the token. Log in with `hf auth login`, or set HF_TOKEN to a token that is "
    "still valid",
    403: "does not let this token do that. Use a token with write access to that namespace",
    404: "finds no such repository or revision. Check --repo-id and --revision",
    409: "says that this conflicts with what is there. Look at the repository, and run the same "
    "command again",
    412: "says that somebody else changed the repository meanwhile. Look at it, and run the same "
    "command again",
    413: "finds it too large. Look at the quota of the namespace",
    429: "asks to wait: too many requests. Run the same command again later; it sends only what "
    "is missing",
}


class Refusal(NamedTuple):
    """Why a request failed, and the seconds to wait before a retry; None for no retry."""

    problem: str
    wait: float | None


@cache
def failures() -> tuple[type[Exception], ...]:
    """The exceptions of the Hub library for failures of the Hub and of the connection."""
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library below huggingface_hub has changed its name once; the root of its errors has
    # stayed the parent of this one.
    of_http = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    # RuntimeError is what uploads of large files raise, by LFS and by xet, with the reason behind
    # it; ValueError is what a refused header of the card, or a wrong name, raises.
    return (of_http, OSError, RuntimeError, ValueError)


def explain(error: Exception, attempt: int) -> Refusal:
    """The refusal behind an exception; `attempt` counts from 0."""
    from huggingface_hub.errors import (
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return Refusal("HF_HUB_OFFLINE is set. Unset it to publish", None)
    if isinstance(error, LocalTokenNotFoundError):
        return Refusal(f"there is no token, and the Hub {_MEANINGS[401]}", None)
    if isinstance(error, HFValidationError):
        return Refusal("that is no name on the Hub. Check --repo-id", None)
    response = _response_of(error)
    if response is not None:
        return _refusal_of(response, attempt)
    if str(error).startswith("Invalid metadata"):
        return Refusal("the Hub refuses the card's header. Run `abliterator card` again", None)
    return Refusal(
        f"the connection failed ({type(error).__name__}). Run the same command again; it sends "
        "only what is missing",
        2.0**attempt,
    )


def _refusal_of(response: Any, attempt: int) -> Refusal:
    status = int(response.status_code)
    meaning = _MEANINGS.get(status, "failed. Run the same command again later")
    retry_after = str(response.headers.get("Retry-After", "")).strip()
    wait = float(retry_after) + 1 if retry_after.isdigit() else 2.0**attempt
    is_retried = status in _BUSY and wait <= _LONGEST_WAIT
    return Refusal(f"the Hub {meaning} (HTTP {status})", wait if is_retried else None)


def _response_of(error: BaseException) -> Any:
    """The HTTP response behind an exception, or None."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "response", None) is not None:
            return cause.response  # type: ignore[attr-defined]
        cause = cause.__cause__
    return None
