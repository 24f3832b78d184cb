"""The error of a failed push: it says what happened, where the model is, and how to resume."""

from __future__ import annotations

import os
import shlex


class HubPushError(RuntimeError):
    """A push that failed; nothing on disk was lost.

    Args:
        problem: What happened, and what to do about it.
        repo_id: The repository of the push.
        folder: Where the model is; None before it exists.
        resume: Command that repeats the push; by default ``hf-continual push FOLDER REPO_ID``.
        whole: Whether the folder is known to hold a complete model; only then does the message say that it is safe.
    """

    def __init__(
        self,
        problem: str,
        repo_id: str,
        folder: str | os.PathLike[str] | None = None,
        resume: str | None = None,
        whole: bool = True,
    ) -> None:
        self.problem, self.repo_id, self.folder = problem, repo_id, None if folder is None else str(folder)
        if resume is None and folder is not None:
            resume = f"hf-continual push {shlex.quote(str(folder))} {shlex.quote(repo_id)}"
        self.resume = resume
        after = ""
        if folder is not None and os.path.isdir(folder):
            safe = f" The model is safe in {self.folder}. To push it again: " if whole else " Once that is fixed: "
            after = f"{safe}{self.resume}"
        super().__init__(f"{repo_id} was not pushed: {problem}{after}")
