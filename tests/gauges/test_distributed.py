"""Two processes share a gauge's rows and come to the values, the decision and the weights of one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gauges import child

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_measure_and_decide_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, "-m", "tests.gauges.child", str(tmp_path / "two")],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    two = json.loads((tmp_path / "two" / "outcome.json").read_text())
    one = child.outcome(child.run(tmp_path / "one", gradient_accumulation_steps=2, per_device_train_batch_size=2))
    assert one["step"] == two["step"] < 12 and "back to the weights of step" in two["ended"]
    assert len(one["points"]) == len(two["points"])
    for mine, theirs in zip(one["points"], two["points"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
