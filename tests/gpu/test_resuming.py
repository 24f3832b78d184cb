"""A killed run resumes to the identical end, on each device."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import toy
from tests.gpu import child

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_killed_run_comes_to_the_identical_end(tmp_path, device):
    straight = child.build(tmp_path / "straight", device)
    straight.train()
    folder = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.child", str(folder), device, "5"], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert (folder / "run" / "checkpoint-4").is_dir()
    resumed = child.build(folder, device)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert torch.equal(toy.flat(resumed.model), toy.flat(straight.model))
