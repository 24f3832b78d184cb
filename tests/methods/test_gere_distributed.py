"""The offline pass split over two processes gives the same file as one process."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_continual.data import recording
from hf_continual.methods.gere.states import record
from hf_continual.tensors.reference import last_hidden
from tests import toy

ROOT = Path(__file__).parents[2]
ROWS = [list(range(4, 9 + i % 7)) for i in range(11)]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def made(file: Path, rows=ROWS, able: bool = True) -> None:
    model = toy.model()

    def hidden(ids):
        assert able, "a process without the weights was asked for hidden states"
        return last_hidden(model, ids)

    with torch.no_grad():
        record(file, {"a": 1}, rows, hidden, 1.0, able=able)


def launch(file: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, "-m", "tests.methods.test_gere_distributed", str(file)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.distributed
def test_two_processes_record_what_one_does(tmp_path):
    """Rows are split; fewer rows than processes; only one holds the weights; and a full disk in one stops both."""
    launch(tmp_path / "two.safetensors")
    for kind, rows in (("both", ROWS), ("first", ROWS), ("few", ROWS[:1])):
        made(tmp_path / f"one-{kind}.safetensors", rows)
        one, two = (load_file(tmp_path / f"{name}-{kind}.safetensors") for name in ("one", "two"))
        assert torch.equal(one["states"], two["states"]) and torch.equal(one["offsets"], two["offsets"])
        assert torch.allclose(one["low"], two["low"], atol=1e-7)
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*full.safetensors"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    second = torch.distributed.get_rank() == 1
    name = sys.argv[1].removesuffix(".safetensors")
    made(Path(f"{name}-both.safetensors"))
    made(Path(f"{name}-first.safetensors"), able=not second)
    made(Path(f"{name}-few.safetensors"), ROWS[:1])
    if second:
        recording.save_file = full
    with pytest.raises(OSError, match="could not be written: No space left on device"):
        made(Path(f"{name}-full.safetensors"))
    torch.distributed.destroy_process_group()
