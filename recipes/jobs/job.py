# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-continual"]
#
# [tool.uv.sources]
# hf-continual = { path = "../.." }   # this checkout; without one: { git = "https://github.com/OWNER/hf_continual" }
# ///
"""Run a plan as a job with a time limit, and keep its folder in a Hub repository, so that the next job resumes it anywhere.

    uv run recipes/jobs/job.py plan.yaml me/law-run --max-minutes 50

Exit code 0: the plan is complete. 75: stopped in time, and kept; the same command resumes, on this machine or on another. The
repository is private and holds the run's folder as it is, by one commit for each stop.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from huggingface_hub import HfApi, HfFileSystem, snapshot_download

STOPPED = 75  # EX_TEMPFAIL of sysexits.h, as hf-continual says it
NOT_KEPT = ["*.lock", ".*.partial", "*/.*.partial", ".cache/**"]
FROM_GIT = {".gitattributes"}
OF_A_RUN = {"plan.json", "continual_results.json"}


def local(plan: str) -> str:
    """The plan as a file here; one on the Hub, such as hf://datasets/me/plans/law.yaml, is fetched."""
    if not plan.startswith("hf://"):
        return plan
    here = Path(plan).name
    HfFileSystem().get_file(plan, here)
    return here


def note_of(folder: Path) -> Path:
    """The file next to the run's folder that says which commit it is."""
    return folder.with_name(f"{folder.name}.commit.json")


def open_repository(api: HfApi, repo: str) -> str:
    """Make the repository if it is not there, and say which commit it is at.

    Raises:
        SystemExit: If it is public, or holds something else than a run.
    """
    api.create_repo(repo, private=True, exist_ok=True)
    info = api.repo_info(repo)
    files = {file.rfilename for file in info.siblings or ()} - FROM_GIT
    if not info.private:
        raise SystemExit(
            f"{repo} is public, and a run's folder holds rows and pickled files. Name a private or a new repository."
        )
    if files and not files & OF_A_RUN:
        some = ", ".join(sorted(files)[:3])
        raise SystemExit(
            f"{repo} holds {some} and no plan.json: keeping a run there would delete its files. Name a new repository."
        )
    return info.sha or ""


def fetch(api: HfApi, repo: str, folder: Path) -> None:
    """Bring the kept run here, unless it is here already.

    Raises:
        SystemExit: If another machine went further than the folder here.
    """
    there = open_repository(api, repo)
    empty = not folder.is_dir() or not any(folder.iterdir())
    if not empty:
        note = note_of(folder)
        here = json.loads(note.read_text(encoding="utf-8"))["commit"] if note.is_file() else None
        if here != there:
            raise SystemExit(
                f"{folder} is at commit {here} of {repo}, which is now at {there}: another job resumed it. Remove {folder} and "
                f"run the same command, which takes the run from {repo}; or keep a run of its own in another repository."
            )
        return
    kept = Path(snapshot_download(repo, revision=there))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=lambda _, names: FROM_GIT & set(names))
    note_of(folder).write_text(json.dumps({"commit": there}), encoding="utf-8")


def keep(api: HfApi, repo: str, folder: Path, message: str) -> None:
    """Make the repository what the folder is, by one commit; files that are gone here, such as old checkpoints, go there."""
    made = api.upload_folder(
        repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=NOT_KEPT, delete_patterns=["*"]
    )
    note_of(folder).write_text(json.dumps({"commit": made.oid}), encoding="utf-8")


def run(plan: str, folder: Path, minutes: float, rest: list[str], signalled: list[int]) -> int:
    """Run the plan for at most some minutes; a signal to the job is noted in `signalled` and passed on."""
    limit = ["--set", f"max_minutes={minutes}"]
    command = [sys.executable, "-m", "hf_continual", "run", plan, "--output-dir", str(folder), *limit, *rest]
    child = subprocess.Popen(command, start_new_session=True)

    def passed_on(number: int, _: object) -> None:
        signalled.append(number)
        child.send_signal(number)

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, passed_on)
    return child.wait()


def main() -> int:
    """Fetch, run, keep; in rounds, if the folder is to be kept more often than the job stops."""
    parser = argparse.ArgumentParser(
        description="Run a plan as a job; what is not known here goes to hf-continual run."
    )
    parser.add_argument("plan", help="The plan: a YAML file, here or on the Hub (hf://...).")
    parser.add_argument("repo", help="Hub repository that keeps the run, such as me/law-run; made if it is not there.")
    parser.add_argument("--folder", type=Path, default=Path("job-out"), help="The run's folder here.")
    parser.add_argument("--max-minutes", type=float, help="Minutes of training after which the job stops.")
    parser.add_argument(
        "--keep-every", type=float, default=30.0, help="Minutes after which the run is kept and resumed at once (30)."
    )
    asked, rest = parser.parse_known_args()
    api, began = HfApi(), time.monotonic()
    plan, signalled = local(asked.plan), list[int]()
    fetch(api, asked.repo, asked.folder)
    while True:
        spent = (time.monotonic() - began) / 60
        left = asked.keep_every if asked.max_minutes is None else max(asked.max_minutes - spent, 1e-4)
        code = run(plan, asked.folder, min(left, asked.keep_every), rest, signalled)
        if asked.folder.is_dir():
            keep(api, asked.repo, asked.folder, "complete" if code == 0 else f"stopped with code {code}")
        spent = (time.monotonic() - began) / 60
        over = asked.max_minutes is not None and spent >= asked.max_minutes
        if code != STOPPED or over or signalled:
            return code


if __name__ == "__main__":
    sys.exit(main())
