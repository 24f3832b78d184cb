"""The pack for a GPU machine: built offline, checked on arrival, run on the CPU with tiny sizes (target `gpu-pack`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GPU = ROOT / "recipes" / "proof" / "gpu"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from recipes.proof import toy

    folder = tmp_path_factory.mktemp("data")
    toy.make_data(folder)
    return folder


def built(out, data, *more):
    done = subprocess.run(
        [sys.executable, str(GPU / "pack.py"), "--no-wheels", "--no-model", "--data", str(data), "--out", str(out), *more],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "gpu" / "manifest.json").read_text())


@pytest.fixture(scope="module")
def pack(tmp_path_factory, data):
    """A pack whose largest piece is so small that the project is in several parts."""
    if subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout")
    out = tmp_path_factory.mktemp("pack")
    return out, built(out, data, "--limit-mb", "0.7", "--part-mb", "0.6")


def arrive(folder, work):
    return subprocess.run(
        [sys.executable, str(folder / "gpu" / "arrive.py"), str(work)], capture_output=True, text=True, check=False
    )


def test_a_pack_is_in_pieces_of_the_size_asked_for(pack):
    out, manifest = pack
    pieces = sorted(out.glob("piece-*"))
    assert len(pieces) > 2 and all(sum(f.stat().st_size for f in p.iterdir()) <= 700_000 for p in pieces)
    told = {f["name"]: f for f in manifest["files"]}
    assert set(told) == {"project.tar.gz", "data.tar.gz"} and len(told["project.tar.gz"]["parts"]) > 1
    assert manifest["commit"].startswith(
        subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    )


def test_pieces_arrive_one_by_one_and_a_damaged_one_is_named(pack, tmp_path):
    out, _ = pack
    pieces = sorted(p.name for p in out.glob("piece-*"))
    travelling, work = tmp_path / "travelling", tmp_path / "work"
    for i, piece in enumerate(pieces):
        shutil.rmtree(travelling, ignore_errors=True)
        shutil.copytree(out / "gpu", travelling / "gpu")
        shutil.copytree(out / piece, travelling / piece)
        if i == 1:
            damaged = next((travelling / piece).iterdir())
            content = damaged.read_bytes()
            damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            said = arrive(travelling, work)
            assert (
                said.returncode == 2 and f"{piece}/{damaged.name} has" in said.stderr and "copy it again" in said.stderr
            )
            damaged.write_bytes(content)
        said = arrive(travelling, work)
        assert said.returncode == (0 if piece == pieces[-1] else 3), said.stderr
        assert (piece in said.stdout) is False and (pieces[-1] in said.stdout) is (piece != pieces[-1])
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    there = {p.relative_to(work / "project").as_posix() for p in (work / "project").rglob("*") if p.is_file()}
    assert there == {n for n in tracked if n and (ROOT / n).is_file()}
    assert (work / "data" / "longseq" / "agnews.test.jsonl").is_file()
    assert arrive(travelling, work).returncode == 0, "all of it is kept"


def run(folder, work, out, **changes):
    environment = {
        **os.environ, "OUT": str(out), "GPU_WORK": str(work), "GPU_SIZE": "tiny", "PYTHON": sys.executable, "PYTHONPATH": "", **changes,
    }  # fmt: skip
    return subprocess.run(
        ["bash", "gpu/run.sh"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_run_sh_states_what_is_off_and_keeps_to_its_time(pack, tmp_path):
    out, _ = pack
    done = run(out, tmp_path / "work", tmp_path / "out", GPU_PARTS="tests nonsense", GPU_TOTAL="4")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests: not run, no time is left of 4 s" in log and "GPU_PARTS names nonsense" in log
    machine = json.loads((tmp_path / "out" / "machine.json").read_text())
    assert machine["about"]["versions"]["torch"] and machine["about"]["commit"] and machine["about"]["card"] is None
    assert "off: torch sees no GPU" in log


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_every_part_runs_on_the_cpu_with_tiny_sizes(pack, tmp_path):
    out, _ = pack
    boxes = {f"GPU_BOX_{name}": "800" for name in ("TESTS", "SPEED", "PROOF", "BIOGRAPHY")}
    done = run(out, tmp_path / "work", tmp_path / "out", GPU_TOTAL="3000", GPU_ARMS="sequential seq", **boxes)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0 and log.count(": done") == 4, done.stdout + done.stderr
    found = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for name in ("tests", "speed", "proof", "biography")
    }
    assert all(f["about"]["commit"] and f["about"]["size"] == "tiny" for f in found.values())
    assert {e["outcome"] for e in found["tests"]["found"].values()} == {"passed"}
    speed = found["speed"]["found"]
    assert any(k.startswith("step, random-tiny") and e["ratios"] for k, e in speed.items())
    assert not [k for k, e in speed.items() if "error" in e]
    assert any(k.startswith("optimizer") for k in speed) and any(k.startswith("evaluation") for k in speed)
    runs = found["proof"]["found"]
    assert set(runs) == {"smoke-tuning-longseq-sequential-seed20", "smoke-claim-longseq-sequential-seed0"}
    split = [
        sys.executable,
        str(GPU / "proofs.py"),
        "--split",
        str(tmp_path / "out" / "proof.json"),
        str(tmp_path / "results"),
    ]
    subprocess.run(split, check=True)
    again = subprocess.run(
        [sys.executable, "recipes/proof/check.py", "--results", str(tmp_path / "results")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0 and "2 result files, 0 differences" in again.stdout, again.stdout + again.stderr
    (arm,) = found["biography"]["found"].values()
    assert set(arm["curve"]) == {"0", "2", "4"} and set(arm["end"]) == {"old", "old, not shown again", "new"}
    assert len(list((tmp_path / "out").iterdir())) <= 8
