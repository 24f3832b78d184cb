"""The offline pass shared by two processes gives the file that one process makes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_continual.data.states import record
from hf_continual.tensors.reference import last_hidden
from tests import toy

ROOT = Path(__file__).parents[2]
ROWS = [list(range(4, 9 + i % 7)) for i in range(11)]


def made(file: Path) -> None:
    model = toy.model()
    with torch.no_grad():
        record(file, {"a": 1}, ROWS, lambda ids: last_hidden(model, ids), 1.0)


@pytest.mark.distributed
def test_two_processes_record_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, "-m", "tests.methods.test_gere_distributed", str(tmp_path / "two.safetensors")],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    made(tmp_path / "one.safetensors")
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert torch.equal(one["states"], two["states"]) and torch.equal(one["offsets"], two["offsets"])
    assert torch.allclose(one["low"], two["low"], atol=1e-7) and not list(tmp_path.glob("*.part"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    made(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
