"""Everything that can be checked before a push, and so before the first training step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hf_continual.hub.errors import HubPushError
from hf_continual.hub.explain import explain
from hf_continual.hub.facts import CardFacts
from hf_continual.hub.licences import License
from hf_continual.hub.refs import is_hub_id
from hf_continual.hub.retry import patiently, status_of

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass
class Target:
    """A repository to push to.

    Args:
        api: The client.
        repo_id: Its full id, with the namespace.
        user: Account of the token.
        token: The token that was given, or None.
        revision: Branch to push to.
        create_pr: Whether a pull request is opened.
        exists: Whether the repository exists; False only in a dry run.
        folder: What is pushed, for messages.
        resume: Command that repeats the push.
        bases: The Hub's information on the parents, by id.
    """

    api: HfApi
    repo_id: str
    user: str
    token: str | None = None
    revision: str = "main"
    create_pr: bool = False
    exists: bool = True
    folder: Path | None = None
    resume: str | None = None
    bases: dict[str, Any] = field(default_factory=dict)

    def error(self, problem: str) -> HubPushError:
        """An error of this push."""
        return HubPushError(problem, self.repo_id, self.folder, self.resume)

    def ask(self, call: Callable[[], Value], what: str) -> Value:
        """Make a call with retries; a failure is an error of this push.

        Args:
            call: The call.
            what: What it does.

        Returns:
            What it returned.

        Raises:
            HubPushError: If it failed permanently.
        """
        try:
            return patiently(call, what)
        except Exception as error:
            raise self.error(explain(error, self.token, self.user)) from error


def preflight(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, create_pr: bool = False,
    token: str | None = None, folder: Path | None = None, resume: str | None = None, create: bool = True,
) -> Target:  # fmt: skip
    """Check token, permissions, repository and branch; create what is missing.

    Args:
        repo_id: ``name`` or ``namespace/name``.
        private: Whether a new repository is private; an existing one must match. None: no preference.
        revision: Branch; created if it does not exist.
        create_pr: Whether a pull request will be opened.
        token: Access token; by default from HF_TOKEN or ``hf auth login``.
        folder: What will be pushed, for messages.
        resume: Command that repeats the push.
        create: Whether anything may be created; not in a dry run.

    Returns:
        Where to push.

    Raises:
        HubPushError: If a push cannot succeed.
        ValueError: If the arguments are invalid.
    """
    if not is_hub_id(repo_id):
        raise ValueError(
            f"{repo_id!r} is not a valid Hub id such as 'name' or 'me/name' (letters, digits, '-', '_' and '.')."
        )
    if create_pr and revision not in (None, "main"):
        raise ValueError(
            f"create_pr=True opens a pull request against main; revision={revision!r} cannot be combined with it."
        )
    target = Target(HfApi(token=token), repo_id, "", token, revision or "main", create_pr, folder=folder, resume=resume)
    if HF_HUB_OFFLINE:
        raise target.error("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it, or train without a push.")
    if token is None and get_token() is None:
        raise target.error("there is no access token. Log in with `hf auth login`, set HF_TOKEN, or pass token=.")
    who = target.ask(lambda: target.api.whoami(cache=True), "asking the Hub for the account")
    target.user = str(who.get("name"))
    if "/" not in repo_id:
        target.repo_id = f"{target.user}/{repo_id}"
    _repository(target, private, create)
    if target.exists:
        if not create_pr:
            _may_write(target)
            _branch(target, create)
    return target


def _info(target: Target) -> Any:
    """The repository, or None if there is none (or none that this account may see)."""

    def look() -> Any:
        try:
            return target.api.model_info(target.repo_id)
        except RepositoryNotFoundError as error:
            if status_of(error) == 401 and target.user == "":
                raise
            return None

    return target.ask(look, "looking for the repository")


def _repository(target: Target, private: bool | None, create: bool) -> None:
    info = _info(target)
    if info is None and target.create_pr:
        raise target.error(
            "the repository does not exist, so no pull request can be opened. Push without create_pr to create it."
        )
    if info is None and not create:
        target.exists = False
        return
    if info is None:
        target.ask(
            lambda: target.api.create_repo(target.repo_id, private=private, exist_ok=True), "creating the repository"
        )
        info = _info(target)
        if info is None:
            raise target.error(
                f"the repository is not visible after it was created. The token of {target.user} may lack read permission there."
            )
    if private is not None and info.private is not None and bool(info.private) != private:
        is_, wanted = ("private", "public") if info.private else ("public", "private")
        raise target.error(
            f"private={private} was requested, but the repository already exists and is {is_}. Make it {wanted} in its "
            f"settings on the Hub, choose another name, or leave private out to push to it unchanged."
        )


def _may_write(target: Target) -> None:
    def check() -> None:
        try:
            target.api.auth_check(target.repo_id, write=True)
        except HfHubHTTPError as error:
            # A Hub without this endpoint: the commit will tell.
            if error.response.status_code != 404:
                raise

    target.ask(check, "checking write permission")


def _branch(target: Target, create: bool) -> None:
    if target.revision == "main":
        return

    def look() -> bool:
        try:
            target.api.model_info(target.repo_id, revision=target.revision)
        except RevisionNotFoundError:
            return False
        return True

    if not target.ask(look, "looking for the branch") and create:
        target.ask(
            lambda: target.api.create_branch(target.repo_id, branch=target.revision, exist_ok=True),
            "creating the branch",
        )


def check_bases(target: Target, facts: CardFacts) -> dict[str, License]:
    """Look up every published parent: it must exist, and its card may state a licence.

    Args:
        target: Where to push; `bases` stores the results.
        facts: The facts.

    Returns:
        Licences by Hub id, if they are stated.

    Raises:
        HubPushError: If a parent is not on the Hub.
    """
    found: dict[str, License] = {}
    for ref in {r.hub_id: r for r in (facts.base, facts.parent, *facts.parents) if r is not None and r.hub_id}.values():
        hub_id, revision = ref.hub_id, ref.revision

        def look(hub_id: str = str(hub_id), revision: str | None = revision) -> Any:
            try:
                return target.api.model_info(hub_id, revision=revision)
            except (RepositoryNotFoundError, RevisionNotFoundError) as error:
                raise target.error(
                    f"{hub_id}{f' at {revision}' if revision else ''} is named as a base of this model, but the Hub does not "
                    f"have it (or does not show it to {target.user}). Publish it first, or name the right one: "
                    f"ContinualConfig(hub_base_model='...') or base_model= of the push."
                ) from error

        try:
            info = target.ask(look, f"looking for {hub_id}")
        except HubPushError as error:
            raise (error.__cause__ if isinstance(error.__cause__, HubPushError) else error) from error
        target.bases[str(hub_id)] = info
        card = info.card_data
        stated = card.get("license") if card is not None else None
        if isinstance(stated, str):
            found[str(hub_id)] = License(stated, card.get("license_name"), card.get("license_link"))
    return found
