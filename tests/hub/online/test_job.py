"""The job of recipes/jobs: stopped in time, killed, and resumed on another machine, it ends with the undisturbed run's matrix."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi

from hf_continual import train_stream
from tests.hub.plugin import HUB
from tests.stream import world

ROOT = Path(__file__).parents[3]
JOB = ROOT / "recipes" / "jobs" / "job.py"
COMMAND = [sys.executable, str(JOB), "plan.yaml", "me/run", "--quiet"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def machine(folder: Path) -> Path:
    """A folder with the plan and its files, and nothing else."""
    folder.mkdir()
    plan = yaml.safe_load(yaml.safe_dump(world.make(folder)).replace(f"{folder}/", ""))
    plan["tasks"] = plan["tasks"][:2]
    world.write(folder, plan)
    return folder


def job(place: Path, *more: str, plan: str = "plan.yaml") -> int:
    made = subprocess.run(
        [*COMMAND[:2], plan, *COMMAND[3:], *more], cwd=place, capture_output=True, text=True, check=False
    )
    assert made.returncode in (0, 75), made.stderr[-4000:]
    return made.returncode


def matrix(folder: Path) -> list:
    return json.loads((folder / "continual_results.json").read_text())["matrix"]["scores"]


def test_the_script_says_what_it_needs():
    block = re.search(r"^# /// script\n(.*?)^# ///$", JOB.read_text(encoding="utf-8"), re.S | re.M)
    needs = tomllib.loads("".join(line.removeprefix("#").lstrip(" ") for line in block[1].splitlines(True)))
    assert needs["dependencies"] == ["hf-continual"] and needs["requires-python"] == ">=3.11"


def started(place: Path) -> subprocess.Popen:
    """The job, in a session of its own; its plan is another process."""
    return subprocess.Popen(COMMAND, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def once(running: subprocess.Popen, file: Path) -> None:
    """Wait until the running job has written a file."""
    pause = threading.Event()
    while not file.exists():
        assert running.poll() is None, running.stderr.read()[-4000:]
        pause.wait(0.02)  # time.sleep is the Hub's here


def test_a_job_is_resumed_on_another_machine(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    straight, first, second = (machine(tmp_path / name) for name in ("straight", "first", "second"))
    with monkeypatch.context() as here:
        here.chdir(straight)
        train_stream(yaml.safe_load(Path("plan.yaml").read_text()))
    # A time limit that is over before the folder is there: nothing to keep.
    assert job(first, "--max-minutes", "0.0002") == 75
    repo = HUB.repos["me/run"]
    assert repo.private and not repo.content_commits()
    # Stopped within a task: the job passes the signal on, and keeps the checkpoint by one commit.
    running = started(first)
    once(running, first / "job-out" / "task-00-t0.partial" / "checkpoint-2")
    running.send_signal(signal.SIGTERM)
    said = running.communicate()[1]
    assert running.returncode == 75, said[-4000:]
    assert len(repo.content_commits()) == 1
    kept = set(repo.head().tree)
    assert any("checkpoint-" in name for name in kept) and not any(name.endswith(".lock") for name in kept)
    # Killed with its child once it is further: nothing more is kept.
    running = started(first)
    once(running, first / "job-out" / "task-00-t0" / "model.safetensors")
    running.kill()
    for child in (p for p in Path("/proc").glob("[0-9]*") if _works_in(p, first)):
        os.kill(int(child.name), signal.SIGKILL)
    running.communicate()
    assert len(repo.content_commits()) == 1
    # Another machine, with the plan from the Hub.
    HfApi().create_repo("me/plans", private=True)
    HfApi().upload_file(path_or_fileobj=second / "plan.yaml", path_in_repo="plan.yaml", repo_id="me/plans")
    (second / "plan.yaml").unlink()
    assert job(second, plan="hf://me/plans/plan.yaml") == 0
    assert len(repo.content_commits()) == 2
    out = second / "job-out"
    assert matrix(out) == matrix(straight / "out")
    for task in ("task-00-t0", "task-01-t1"):
        assert torch.equal(world.weights(out / task), world.weights(straight / "out" / task))
        assert f"{task}/model.safetensors" in repo.head().tree
    # A folder that is behind its repository is not resumed.
    assert "another job resumed it" in refused(first, "me/run")


def test_repositories_that_are_not_a_runs(tmp_path, hub):
    api = HfApi()
    api.create_repo("me/open")
    assert "me/open is public" in refused(tmp_path, "me/open")
    api.create_repo("me/model", private=True)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="me/model")
    assert "me/model holds config.json and no plan.json" in refused(tmp_path, "me/model")


def refused(place: Path, repo: str) -> str:
    """What the job says when it refuses a repository."""
    ran = subprocess.run(
        [sys.executable, str(JOB), "plan.yaml", repo], cwd=place, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    return ran.stderr


def _works_in(process: Path, folder: Path) -> bool:
    try:
        return Path(os.readlink(process / "cwd")) == folder
    except OSError:
        return False
