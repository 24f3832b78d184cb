"""One commit for a whole folder, made only once: before each attempt the repository is compared with the folder.

`create_commit` makes one commit on both storage paths of the client. It does not retry the commit call, so that is
done here. A commit whose response was lost is found by its checksums and not made twice.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile

from hf_continual.hub import retry
from hf_continual.hub.contents import WEIGHTS, Contents
from hf_continual.hub.errors import HubPushError
from hf_continual.hub.explain import explain
from hf_continual.hub.preflight import Target

LISTED = "continual/methods.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remote:
    """The contents of a branch.

    Args:
        sha: Its commit.
        files: Path -> sha256 (None for files in git itself) and git blob id.
    """

    sha: str
    files: dict[str, tuple[str | None, str]]

    def differs(self, contents: Contents) -> list[str]:
        """Names of the files that are missing or different there."""
        return [n for n in contents.files if n not in self.files or not contents.matches(n, *self.files[n])]

    def stale(self, contents: Contents) -> list[str]:
        """Weights that would be loaded instead of, or along with, the new ones, and method state learned with other weights."""
        ours = LISTED in self.files  # otherwise a folder of that name is not this library's
        gone = [n for n in self.files if n not in contents.files] if ours else []
        learned = [
            n for n in gone if fnmatch.fnmatch(n, "continual/*.json") or fnmatch.fnmatch(n, "continual/*.safetensors")
        ]
        patterns = [*WEIGHTS, "config.json"] if contents.is_adapter else [*WEIGHTS]
        names = [n for n in self.files if "/" not in n and n not in contents.files]
        return [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)] + learned


def read_remote(target: Target, revision: str) -> Remote:
    """Read a branch: its commit, and its files at that commit."""

    def read() -> Remote:
        sha = target.api.model_info(target.repo_id, revision=revision).sha
        assert sha is not None
        tree = target.api.list_repo_tree(target.repo_id, recursive=True, revision=sha)
        files = {f.path: (f.lfs.sha256 if f.lfs else None, f.blob_id) for f in tree if isinstance(f, RepoFile)}
        return Remote(sha, files)

    return retry.patiently(read, "reading the repository")


@dataclass(frozen=True)
class Committed:
    """A commit with the folder's contents.

    Args:
        sha: Its id.
        url: Its page.
        pr_url: Page of its pull request.
        new: Whether this push made it.
    """

    sha: str
    url: str
    pr_url: str | None = None
    new: bool = True


def commit(target: Target, rebuild: Callable[[Remote], Contents], message: str) -> Committed:
    """Make a branch match the folder, with at most one commit.

    Args:
        target: Where to push.
        rebuild: Renders the card against the branch's current contents, and lists the files.
        message: First line of the commit.

    Returns:
        The commit with the folder's contents.

    Raises:
        HubPushError: If it could not be made.
    """
    attempt, last, contents = 0, None, None
    try:
        while True:
            try:
                remote = read_remote(target, target.revision)
                if contents is None or remote.sha != last:
                    contents, last = rebuild(remote), remote.sha
                if (there := _is_there(target, contents, remote)) is not None:
                    return there
                return _send(target, contents, message, remote)
            except Exception as error:
                moved = retry.status_of(error) == 412
                wait = retry.PATIENCE.wait(attempt, error) if not moved else 0.5
                if wait is None or attempt + 1 >= retry.PATIENCE.attempts:
                    raise
                retry.pause("committing", error, wait)
                attempt += 1
    except HubPushError:
        raise
    except Exception as error:
        raise target.error(explain(error, target.token, target.user)) from error


def _is_there(target: Target, contents: Contents, remote: Remote) -> Committed | None:
    """The commit that already holds the folder, if any: from an earlier push, or one whose response was lost."""
    if not remote.differs(contents) and not remote.stale(contents):
        return Committed(remote.sha, _url(target, remote.sha), new=False)
    if not target.create_pr:
        return None
    refs = target.api.list_repo_refs(target.repo_id, include_pull_requests=True).pull_requests or []
    for ref in sorted(refs, key=lambda r: int(r.name) if r.name.isdigit() else 0, reverse=True)[:5]:
        proposed = read_remote(target, ref.ref)
        if not proposed.differs(contents) and not proposed.stale(contents):
            number = ref.ref.rsplit("/", 1)[-1]
            page = f"{target.api.endpoint}/{target.repo_id}/discussions/{number}"
            return Committed(proposed.sha, _url(target, proposed.sha), page, new=False)
    return None


def _send(target: Target, contents: Contents, message: str, remote: Remote) -> Committed:
    operations: list[Any] = [CommitOperationAdd(n, str(contents.files[n])) for n in remote.differs(contents)]
    operations += [CommitOperationDelete(name) for name in remote.stale(contents)]
    for operation in operations:
        if isinstance(operation, CommitOperationDelete):
            logger.info(
                "%s is deleted from the repository: it does not belong to the new weights", operation.path_in_repo
            )
    info = target.api.create_commit(
        target.repo_id, operations, commit_message=message, revision=None if target.create_pr else target.revision,
        create_pr=target.create_pr, parent_commit=remote.sha,
    )  # fmt: skip
    return Committed(info.oid, str(info.commit_url), info.pr_url)


def _url(target: Target, sha: str) -> str:
    return f"{target.api.endpoint}/{target.repo_id}/commit/{sha}"


def check_arrived(target: Target, contents: Contents, sha: str) -> None:
    """Compare a commit with the folder, file by file.

    Args:
        target: Where it was pushed.
        contents: What was pushed.
        sha: The commit.

    Raises:
        HubPushError: If a file differs.
    """
    if wrong := target.ask(lambda: read_remote(target, sha), "checking the pushed files").differs(contents):
        raise target.error(f"{wrong[0]} arrived with another checksum (commit {sha[:7]}). Push again.")


def tag_commit(target: Target, tag: str, sha: str) -> None:
    """Tag a commit.

    Args:
        target: The repository.
        tag: The name.
        sha: The commit.

    Raises:
        HubPushError: If another commit has the tag.
    """

    def known() -> str | None:
        refs = target.api.list_repo_refs(target.repo_id)
        return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)

    at = target.ask(known, "reading the tags")
    if at == sha:
        return
    if at is not None:
        raise target.error(
            f"the model is there (commit {sha[:7]}), but the tag {tag!r} already names commit {at[:7]}. Choose another tag, or "
            f"delete that one on the Hub."
        )
    target.ask(lambda: target.api.create_tag(target.repo_id, tag=tag, revision=sha, exist_ok=True), "making the tag")
