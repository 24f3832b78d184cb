"""Explain a failure of the Hub and what to do about it; never with the value of a token."""

from __future__ import annotations

import os

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_continual.hub.retry import asked_wait, causes, passes, status_of
from hf_continual.hub.text import TOKEN


def token_source(token: str | None) -> str:
    """The source of the token, in words."""
    if token:
        return "the token given as an argument"
    return "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token saved by `hf auth login`"


def explain(error: BaseException, token: str | None = None, user: str | None = None) -> str:
    """Explain a failure in a sentence or two.

    Args:
        error: What was raised.
        token: The token that was given, or None.
        user: Account of the token, if it is known.

    Returns:
        What happened and what to do.
    """
    return hide(_explain(error, token, user), token)


def hide(text: str, token: str | None) -> str:
    """Remove anything that is a token from a text."""
    for secret in (token, os.environ.get("HF_TOKEN")):
        if secret:
            text = text.replace(secret, "...")
    return TOKEN.sub("...", text)


def _explain(error: BaseException, token: str | None, user: str | None) -> str:
    chain = list(causes(error))
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it and push again."
    gated = next((e for e in chain if isinstance(e, GatedRepoError)), None)
    if gated is not None:
        return f"a model is gated and this account has not accepted its terms: {_said(gated)}"
    status, http = status_of(error), next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    who = f" (account {user})" if user else ""
    if status == 401:
        return (
            f"401: the Hub does not accept {token_source(token)}. Log in with `hf auth login`, or pass another token; a "
            f"repository that is missing or private gives the same answer."
        )
    if status == 403:
        return (
            f"403: {token_source(token)}{who} may not write there: {_said(http)}. Use a token with the write role for this "
            f"namespace, push to your own namespace, or open a pull request with create_pr=True."
        )
    if status == 404:
        what = "the branch" if isinstance(http, RevisionNotFoundError) else "the repository"
        what = what if isinstance(http, RevisionNotFoundError | RepositoryNotFoundError) else "part of it"
        return f"404: the Hub cannot find {what}{who}: {_said(http)}."
    if status == 409:
        return f"409: this name already exists, or another operation is in progress: {_said(http)}."
    if status == 412:
        return "412: someone else kept committing to the repository. Push again when they are done."
    if status == 413:
        return f"413: too large for the Hub: {_said(http)}."
    if status == 429:
        asked = asked_wait(error)
        when = f" The Hub asks to wait {asked:.0f} s." if asked else " It counts commits per hour and repository."
        return f"429: too many requests.{when} Push again then; uploaded files are not sent again."
    if status is not None and status >= 500:
        return f"{status}: the Hub reports a server error. Push again later; uploaded files are not sent again."
    if status is not None:
        return f"{status}: {_said(http)}"
    last = chain[-1]
    inner = f" ({type(last).__name__}: {last})" if last is not error and str(last) else ""
    text = f"{type(error).__name__}: {error}{inner}"
    if passes(error):
        return (
            f"the connection failed repeatedly: {text} Push again; uploaded files are not sent again. "
            f"If a proxy blocks Xet traffic, HF_HUB_DISABLE_XET=1 uploads without it."
        )
    return text


def _said(error: BaseException | None) -> str:
    if error is None:
        return "no reason given"
    server = getattr(error, "server_message", None)
    return (server or str(error)).strip().replace("\n", " ")[:300].rstrip(".")
