"""A plan under torchrun: two processes match one with twice the accumulation, and share the scoring."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_continual import train_stream
from hf_continual.atomic_files import read_json, read_lines
from tests.stream import world

ROOT = Path(__file__).parents[2]


def launch(file: Path) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    return subprocess.run(
        [*command, "-m", "hf_continual", "run", str(file), "--quiet"],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_run_a_plan(tmp_path):
    plan = world.make(
        tmp_path,
        methods=[{"replay": {"rows": "kept", "ratio": 0.3}}, {"recadam": {"pull": 0.01, "anneal": "none"}}],
        memory={"policy": "reservoir", "capacity": 6},
    )
    plan["tasks"][2]["curve"] = [0, 4]
    plan["evaluation"]["gauges"] = {"general": {"rows": str(tmp_path / "general.jsonl"), "split": "train"}}
    plan["sft"] |= {"per_device_train_batch_size": 2}
    done = launch(world.write(tmp_path, plan))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("retention") == 1, "one process reports"
    plan["sft"] |= {"gradient_accumulation_steps": 2}
    alone = train_stream({**plan, "output_dir": str(tmp_path / "alone")})
    two = read_json(tmp_path / "out" / "continual_results.json")
    for mine, theirs in zip(alone.results["nll"]["scores"], two["nll"]["scores"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert two["matrix"] == alone.results["matrix"]
    assert two["gauges"]["general"]["change"] == pytest.approx(alone.results["gauges"]["general"]["change"], abs=1e-4)
    assert two["curves"]["t2"]["4"]["t2"]["nll"] == pytest.approx(
        alone.results["curves"]["t2"]["4"]["t2"]["nll"], rel=1e-4
    )
    for i in range(3):
        assert (
            world.weights(tmp_path / "out" / f"task-0{i}-t{i}") - world.weights(tmp_path / "alone" / f"task-0{i}-t{i}")
        ).abs().max() < 1e-5
        kept = [
            read_lines(tmp_path / out / f"task-0{i}-t{i}" / "continual" / "memory.jsonl") for out in ("out", "alone")
        ]
        assert kept[0] == kept[1] and len(kept[0]) == 6
    rows = [read_lines(tmp_path / out / "predictions" / "task-02-t2.t0.jsonl") for out in ("out", "alone")]
    assert [r["prompt_hash"] for r in rows[0]] == [r["prompt_hash"] for r in rows[1]], "gathered in their order"
    plan["sft"]["learning_rate"] = 0.5
    refused = launch(world.write(tmp_path, plan))
    assert refused.returncode != 0 and "was started with another plan" in refused.stderr
