"""What stops a push: one error that says what was met, where the model is, and how to go on."""

from __future__ import annotations

import os
import shlex


class HubPushError(RuntimeError):
    """A push that did not happen; nothing on the disk was lost by it.

    Args:
        problem: What was met, and what to do about it.
        repo_id: Where it was to go.
        folder: Where the model is; None before there is one.
        resume: Command that makes the push again; by default ``hf-continual push FOLDER REPO_ID``.
        whole: Whether the folder was found to hold a whole model; only then the message says that it is safe.
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
            safe = f" The model is safe in {self.folder}. To push it again: " if whole else " When that is mended: "
            after = f"{safe}{self.resume}"
        super().__init__(f"{repo_id} was not pushed: {problem}{after}")
