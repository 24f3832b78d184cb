"""Values per token: one pass that resumes where it was killed, of any shape and dtype, read row by row."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from hf_continual import stopping
from hf_continual.data.recording import record
from hf_continual.data.spill import HEAD, SUM, Keeping

ROWS = [list(range(1, 4 + i % 5)) for i in range(150)]


def value(ids, shape=(), dtype=torch.float32):
    torch.manual_seed(sum(ids) + len(ids))
    return torch.randn(len(ids), *shape).to(dtype)


class Summing(Keeping):
    what = "sums"
    small = ("total",)

    def __init__(self):
        self.total = torch.zeros(())

    def see(self, values):
        self.total = self.total + values.float().sum()

    def seen(self):
        return {"total": self.total}


@pytest.mark.parametrize(("shape", "dtype"), [((), torch.float32), ((3,), torch.bfloat16), ((2, 2), torch.int8)])
def test_any_shape_and_type(tmp_path, shape, dtype):
    made = record(tmp_path / "x.safetensors", {}, ROWS, lambda ids: value(ids, shape, dtype))
    for i, ids in enumerate(ROWS):
        assert torch.equal(made.row(i, len(ids)), value(ids, shape, dtype))
    assert made.row(3, 2).shape == (2, *shape)


@pytest.mark.parametrize("end", ["killed", "stopped", "stopped in a row"])
@pytest.mark.parametrize("at", [1, 70, 150])
def test_interrupted_it_resumes(tmp_path, end, at):
    straight = record(tmp_path / "straight.safetensors", {}, ROWS, value, Summing())
    calls, file = [], tmp_path / "x.safetensors"

    def interrupted(ids):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL if end == "killed" else signal.SIGTERM)
        return value(ids)

    child = os.fork()
    if child == 0:
        try:
            for number in stopping.SIGNALS:
                signal.signal(getattr(signal, number), signal.SIG_DFL)
            with stopping.listening(""):
                record(file, {}, ROWS, interrupted, Summing())
        except SystemExit as stopped:
            os._exit(int(stopped.code or 0))
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-signal.SIGKILL if end == "killed" else 75) and not file.is_file()
    (spill,) = tmp_path.glob("x.0.1.spill.part")
    if end == "stopped in a row":
        with spill.open("ab") as out:
            out.write(b"half of a row")
    size = spill.stat().st_size - HEAD
    made = record(file, {}, ROWS, lambda ids: (calls.append(1), value(ids))[1], Summing())
    assert file.read_bytes() == straight.file.read_bytes()
    assert not list(tmp_path.glob("*.part"))
    again = len(calls)
    rows_there = sum(sum(4 * len(row) + SUM for row in ROWS[: i + 1]) <= size for i in range(len(ROWS)))
    assert again == len(ROWS) - rows_there, "only the missing rows are computed"
    assert end == "killed" or rows_there >= at - 1
    assert torch.equal(made.tensor("total"), straight.tensor("total"))


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"\xff" * 200, b'{"dtype": "nonsense", "shape": []}'.ljust(HEAD) + b"x" * 80]
)
def test_a_damaged_beginning_is_started_again(tmp_path, damage):
    (tmp_path / "x.0.1.spill.part").write_bytes(damage)
    made = record(tmp_path / "x.safetensors", {}, ROWS, value)
    assert all(torch.equal(made.row(i, len(ids)), value(ids)) for i, ids in enumerate(ROWS))


def test_an_error_leaves_nothing(tmp_path):
    def wrong(ids):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        record(tmp_path / "x.safetensors", {}, ROWS, wrong)
    assert {p.name for p in tmp_path.iterdir()} <= {"x.lock"}
