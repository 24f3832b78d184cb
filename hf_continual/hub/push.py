"""`push_to_hub`: a complete folder on disk becomes one commit, or one clear error that loses nothing."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from hf_continual.hub import adapters
from hf_continual.hub.commit import Remote, check_arrived, commit, tag_commit
from hf_continual.hub.contents import Contents, collect, secrets_in_use
from hf_continual.hub.errors import HubPushError
from hf_continual.hub.explain import hide
from hf_continual.hub.facts import CardFacts
from hf_continual.hub.files import README, installed_versions, write_card
from hf_continual.hub.folder_facts import has_chat, has_facts, is_adapter, read_facts
from hf_continual.hub.licences import with_license
from hf_continual.hub.lint import lint_folder
from hf_continual.hub.notices import copy_notices
from hf_continual.hub.preflight import Target, check_bases, preflight
from hf_continual.hub.published import read_published, write_published
from hf_continual.hub.refs import ModelRef, is_hub_id
from hf_continual.hub.reload import check_loads
from hf_continual.hub.text import is_generated, kept_text, merged_author

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Args:
        repo_id: The repository.
        oid: The commit that holds the folder; None in a dry run.
        commit_url: Its page.
        pr_url: Page of the pull request, if one was opened.
        new: Whether this push made the commit; False if everything was already there.
        files: Paths in the repository.
        left_out: Files of the folder that were not pushed.
        size: Total bytes of the files.
    """

    repo_id: str
    oid: str | None
    commit_url: str | None
    pr_url: str | None
    new: bool
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    size: int


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    tag: str | None = None,
    dry_run: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    method_state: bool = True,
    include: Sequence[str] = (),
    message: str = "Model, card and evidence",
) -> Pushed | None:
    """Publish a folder: weights, tokenizer, card, configuration, results and images in one commit.

    The card is rendered again from the facts in the folder, and keeps the author's text in the repository. Everything that can be
    checked is checked before the first byte is sent. A failed push can be repeated: nothing is uploaded twice, and
    a commit whose response was lost is found by its checksums.

    Example:
        >>> push_to_hub("out/task-02-tickets", "me/three-tasks", tag="task-3")

    Args:
        folder: A model or adapter as ContinualTrainer, train_stream, a merge or `save_pretrained` wrote it.
        repo_id: ``name`` or ``namespace/name``; created if it does not exist.
        private: Whether a new repository is private; an existing one must match. None: the account's default, or
            unchanged.
        revision: Branch; created if it does not exist.
        create_pr: Open a pull request and leave the branch unchanged.
        token: Access token; by default from HF_TOKEN or ``hf auth login``.
        tag: Name for the commit.
        dry_run: Run every check, send nothing and create no repository; the card is rendered in the folder.
        license: Licence of the model; needed if the parents' licences differ.
        base_model: Hub id of the base model, if the folder names only a local copy.
        method_state: Whether to push the methods' state with the model, so that the next task can be trained from the
            repository; it holds tensors and numbers, no rows.
        include: Additional files, by their path in the folder. Rows of data, such as ``"continual/memory.jsonl"``, are pushed
            only this way.
        message: First line of the commit.

    Returns:
        The result; None on all processes except the first.

    Raises:
        HubPushError: If it was not pushed. The folder is complete, and the message names the command to resume.
        ValueError: If the arguments are invalid.
    """
    if not is_first_process():
        return None
    place = Path(folder)
    flags = {"private": private, "revision": revision, "create_pr": create_pr or None, "tag": tag, "license": license}
    flags |= {"base_model": base_model, "method_state": None if method_state else False, "include": tuple(include)}
    resume = resume_command(place, repo_id, flags)
    early = Draft(repo_id, place, resume, token)
    choice: dict[str, Any] = {"method_state": method_state, "include": tuple(include)}
    contents = replace(early, whole=False).local(lambda: collect(place, secrets_in_use(token), **choice))
    facts = early.local(lambda: folder_facts(place, base_model))
    target = preflight(
        repo_id, private=private, revision=revision, create_pr=create_pr, token=token, folder=place, resume=resume,
        create=not dry_run,
    )  # fmt: skip
    if facts is not None:
        facts = replace(facts, method_state=None if method_state else "left out")
        facts = _complete(target, facts, place, license)
    push = _Push(target, facts, place, contents, choice)
    contents = push.rebuild(None)
    if dry_run:
        names = tuple(contents.files)
        return Pushed(target.repo_id, None, None, None, False, names, contents.left_out, contents.size)
    done = commit(target, push.rebuild, message)
    contents = push.contents
    check_arrived(target, contents, done.sha)
    if tag is not None:
        tag_commit(target, tag, done.sha)
    if not create_pr:
        write_published(place, target.repo_id, done.sha, kept_text(_card(place)))
    for name in contents.left_out:
        logger.info("%s was left out of the push", name)
    names, left_out = tuple(contents.files), contents.left_out
    return Pushed(target.repo_id, done.sha, done.url, done.pr_url, done.new, names, left_out, contents.size)


def is_first_process() -> bool:
    """Whether this is the process that pushes; needs no communication, so no process waits for another."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def resume_command(folder: Path, repo_id: str, flags: Mapping[str, Any]) -> str:
    """The command that repeats a push, without the token.

    Args:
        folder: The folder.
        repo_id: The repository.
        flags: Options by name; those that are None are left out.

    Returns:
        A line for a shell.
    """
    words = ["hf-continual", "push", str(folder), repo_id]
    for name, value in flags.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif value is False:
            words.append("--public" if name == "private" else f"--no-{option[2:]}")
        elif isinstance(value, tuple):
            words += [word for entry in value for word in (option, entry)]
        elif value is not None:
            words += [option, str(value)]
    return shlex.join(words)


@dataclass(frozen=True)
class Draft:
    """A push before any request to the Hub.

    Args:
        repo_id: The repository.
        folder: The folder.
        resume: Command that repeats the push.
        token: The token that was given.
        whole: Whether the folder is known to hold a complete model.
    """

    repo_id: str
    folder: Path
    resume: str
    token: str | None = None
    whole: bool = True

    def local(self, call: Callable[[], Value]) -> Value:
        """Run a check of the folder; a failure is an error of this push.

        Args:
            call: The check.

        Returns:
            What it returned.

        Raises:
            HubPushError: If it failed.
        """
        try:
            return call()
        except (ValueError, OSError, KeyError) as error:
            problem = hide(str(error), self.token)
            raise HubPushError(problem, self.repo_id, self.folder, self.resume, self.whole) from error


def folder_facts(folder: Path, base_model: str | None = None) -> CardFacts | None:
    """The facts about a folder's model; None if a card written by hand is to be pushed unchanged.

    Args:
        folder: The folder.
        base_model: Hub id of its base, if the folder names only a local copy.

    Returns:
        The facts; for an adapter, always with a published base.

    Raises:
        ValueError: If it is an adapter on an unpublished model.
    """
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(f"base_model={base_model!r} is not a valid Hub id such as 'me/model'.")
    if has_facts(folder):
        facts: CardFacts | None = read_facts(folder)
    elif (card := _card(folder)) and kept_text(card) and not is_generated(card):
        facts = None
    else:
        facts = CardFacts(
            folder.resolve().name, kind="adapter" if is_adapter(folder) else "model", chat=has_chat(folder),
            versions=installed_versions(),
        )  # fmt: skip
    named = ModelRef(base_model) if base_model else None
    if is_adapter(folder):
        base = adapters.named_base(folder, named or (facts.base if facts is not None else ModelRef()))
        return None if facts is None else replace(facts, base=base)
    return replace(facts, base=named) if facts is not None and named is not None else facts


def _card(folder: Path) -> str:
    file = folder / README
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _complete(target: Target, facts: CardFacts, folder: Path, license: str | None) -> CardFacts:
    """Add what only the Hub knows: whether the parents exist, and their licences."""
    draft = Draft(target.repo_id, folder, target.resume or "", target.token)
    known = check_bases(target, facts)
    facts = draft.local(lambda: with_license(facts, license, known))
    copy_notices(target, folder)
    if is_adapter(folder):
        adapters.write_base(folder, facts.base)
    if facts.merge is not None:
        draft.local(lambda: check_loads(folder))
    return replace(facts, repo_id=target.repo_id)


class _Push:
    """The card and the files of one push, rebuilt whenever the branch has moved."""

    def __init__(
        self, target: Target, facts: CardFacts | None, folder: Path, contents: Contents, choice: Mapping[str, Any]
    ) -> None:
        self.target, self.facts, self.folder, self.contents, self.choice = target, facts, folder, contents, choice
        self.draft = Draft(target.repo_id, folder, target.resume or "", target.token)
        self.mine = _card(folder)
        self.recorded = read_published(folder).get("kept")

    def rebuild(self, remote: Remote | None) -> Contents:
        """Write the card, keeping the author's text in the folder and in the branch, and check it."""
        if self.facts is not None:
            theirs = "" if remote is None else self._fetch(remote)
            write_card(self.folder, self.facts, merged_author(self.mine, theirs, self.recorded))
        findings = lint_folder(self.folder)
        for claim in [found for found in findings if found.is_claim]:
            logger.warning("%s", claim)
        if stops := [found for found in findings if not found.is_claim]:
            listed = "\n  ".join(str(found) for found in stops)
            raise self.target.error(f"its card has findings, so nothing was sent:\n  {listed}\n")
        self.contents = self.draft.local(
            lambda: collect(self.folder, secrets_in_use(self.target.token), self.contents, **self.choice)
        )
        return self.contents

    def _fetch(self, remote: Remote) -> str:
        if README not in remote.files:
            return ""
        file = self.target.ask(
            lambda: self.target.api.hf_hub_download(self.target.repo_id, README, revision=remote.sha),
            "reading the card",
        )
        return Path(file).read_text(encoding="utf-8", errors="replace")
