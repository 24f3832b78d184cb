"""Bounded retries: honour Retry-After, retry transient failures, give up on permanent ones."""

from __future__ import annotations

import email.utils
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

PASSING = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Patience:
    """How often and how long transient failures are retried.

    Args:
        attempts: Maximum number of calls.
        first: Seconds before the second call; doubled each time.
        longest: Longest wait in seconds, unless the server asks for one.
        asked: Longest wait in seconds that the server may ask for.
    """

    attempts: int = 6
    first: float = 1.0
    longest: float = 30.0
    asked: float = 330.0

    def wait(self, attempt: int, error: BaseException) -> float | None:
        """Seconds to wait after a failed attempt, counted from 0; None means giving up."""
        if attempt + 1 >= self.attempts or not passes(error):
            return None
        wanted = asked_wait(error)
        if wanted is None:
            return min(self.first * 2**attempt, self.longest)
        # One extra second: the server's clock rounds down.
        return None if wanted > self.asked else wanted + (1.0 if wanted else 0.0)


PATIENCE = Patience()


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes: the client wraps an upload's failure in a RuntimeError."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__  # pyrefly: ignore[bad-assignment]


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error comes from, or None."""
    return next((e.response.status_code for e in causes(error) if isinstance(e, HfHubHTTPError)), None)


def passes(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if any(isinstance(e, OfflineModeIsEnabled) for e in causes(error)):
        return False
    status = status_of(error)
    if status is not None:
        return status in PASSING or (status == 409 and "another conflicting operation" in str(error))
    # The client does not export the errors of its HTTP library, which has changed twice: they are recognised by module.
    # An HTML page instead of JSON means that a proxy is down.
    return any(
        isinstance(e, ConnectionError | TimeoutError | json.JSONDecodeError)
        or type(e).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
        for e in causes(error)
    )


def asked_wait(error: BaseException) -> float | None:
    """Seconds that the server asks to wait, or None."""
    for e in causes(error):
        if not isinstance(e, HfHubHTTPError):
            continue
        headers = e.response.headers
        limit = parse_ratelimit_headers(headers)
        if e.response.status_code == 429 and limit is not None and limit.remaining == 0:
            return float(limit.reset_in_seconds)
        if after := headers.get("Retry-After"):
            try:
                return max(0.0, float(after))
            except ValueError:
                when = email.utils.parsedate_to_datetime(after) if "," in after else None
                return None if when is None else max(0.0, when.timestamp() - time.time())
    return None


def patiently(call: Callable[[], Value], what: str, patience: Patience | None = None) -> Value:
    """Retry a call until it succeeds or patience runs out.

    Args:
        call: The call; repeating it must be harmless.
        what: What it does, for the log.
        patience: Limits; by default `PATIENCE`.

    Returns:
        What it returned.

    Raises:
        Exception: The last failure.
    """
    patience = patience or PATIENCE
    attempt = 0
    while True:
        try:
            return call()
        except Exception as error:
            wait = patience.wait(attempt, error)
            if wait is None:
                raise
            pause(what, error, wait)
            attempt += 1


def pause(what: str, error: BaseException, seconds: float) -> None:
    """Log what failed, and wait."""
    status = status_of(error)
    reason = f"HTTP {status}" if status else type(error).__name__
    logger.warning("%s: %s, trying again in %.0f s", what, reason, seconds)
    time.sleep(seconds)
