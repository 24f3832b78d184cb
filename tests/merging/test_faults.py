"""Killed, full, changed, shared: the output is either the right one or the old one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_continual import merge_linear, ties
from hf_continual.merging import pipeline
from hf_continual.merging.engine import combine, writer
from hf_continual.merging.engine.average import Average
from hf_continual.merging.errors import MergeError
from tests.merging.world import adapter, build, digest, family, save

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_at_every_tenth_and_resumed_to_the_same_bytes(tmp_path):
    family(tmp_path, hidden_size=128, intermediate_size=256)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.merging.kill", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["shards"] >= 4
    for tenth, (died, early, finished, again, same, clean) in enumerate(found["tenths"], 1):
        assert (died, early, again, same, clean) == (-9, False, 0, True, True), f"tenth {tenth}: {found['tenths']}"
        assert finished < found["shards"] or tenth == 10
    assert all(found["tenths"][i][2] > 0 for i in (3, 5, 7, 9)), "these were killed only when a file was finished"
    assert found["stopped"] == [[75, True, 0, True, True]] * 3 and "Stopped by SIGUSR1." in ran.stderr
    deaths, same = found["often"]
    assert deaths >= 2 and same
    assert found["old"] == [-9, True]
    assert found["two"] == [1, 0, True] and "Another process is writing" in ran.stderr


def test_a_full_disk_leaves_the_old_output_and_goes_on(tmp_path, monkeypatch):
    _, a, b = family(tmp_path)
    merge_linear([a, b], tmp_path / "out", weights=[1, 0], max_shard_size="30KB")
    old, room = digest(tmp_path / "out"), [50_000]
    real = os.pwrite

    def pwrite(descriptor, data, offset):
        if room[0] < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return real(descriptor, data, offset)

    monkeypatch.setattr(writer.os, "pwrite", pwrite)
    options = {"max_shard_size": "30KB", "overwrite": True}
    with pytest.raises(
        OSError, match=r"The disk is full: model-00002.* The finished files stay in .*merging; free some space"
    ) as error:
        merge_linear([a, b], tmp_path / "out", **options)
    assert error.value.errno == errno.ENOSPC and digest(tmp_path / "out") == old
    room[0] = 10**9
    merge_linear([a, b], tmp_path / "out", **options)
    assert 10**9 - room[0] < sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")), (
        "the first file stayed"
    )
    merge_linear([a, b], tmp_path / "fresh", max_shard_size="30KB")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")
    assert not (tmp_path / ".out.merging").exists()


def test_a_resumed_truncation_still_reports_its_errors(tmp_path, monkeypatch):
    base = build()
    folder, a, b = save(base, tmp_path / "base"), adapter(base, tmp_path / "a", 1), adapter(base, tmp_path / "b", 2)
    call = {"base": folder, "adapter_rank": 3}
    whole = merge_linear([a, b], tmp_path / "whole", **call).report["truncation_errors"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_side_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge_linear([a, b], tmp_path / "out", **call)
        patch.undo()
    again = merge_linear([a, b], tmp_path / "out", **call)
    assert again.report["truncation_errors"] == whole and len(whole) == 6


def test_what_is_finished_is_not_made_again(tmp_path, monkeypatch):
    base, a, b = family(tmp_path)
    made = {f.__name__: f([a, b], tmp_path / f.__name__, base=base) for f in (merge_linear, ties)}
    monkeypatch.setattr(pipeline, "write_shards", None)
    for function in (merge_linear, ties):
        again = function([a, b], tmp_path / function.__name__, base=base)
        assert again.report["files"] == made[function.__name__].report["files"]
    merge_linear([a, b], tmp_path / "merge_linear", base=base, license="mit")
    assert "license: mit" in (tmp_path / "merge_linear" / "README.md").read_text()


@pytest.mark.parametrize("how", ["changed", "removed"])
def test_a_source_that_changes_meanwhile(tmp_path, monkeypatch, how):
    _, a, b = family(tmp_path)
    merge_linear([a, b], tmp_path / "out", weights=[1, 0])
    old = digest(tmp_path / "out")
    called = Average.__call__

    def rule(self, values, at):
        file = b / "model.safetensors"
        if file.exists():
            os.utime(file, ns=(1, 1)) if how == "changed" else file.unlink()
        return called(self, values, at)

    monkeypatch.setattr(combine.Average, "__call__", rule)
    said = (
        r"m2/model.safetensors changed while it was merged: .* bytes"
        if how == "changed"
        else "was removed while it was merged"
    )
    with pytest.raises(MergeError, match=said):
        merge_linear([a, b], tmp_path / "out", overwrite=True)
    assert digest(tmp_path / "out") == old


def test_an_adapter_that_changes_meanwhile(tmp_path, monkeypatch):
    base = build()
    save(base, tmp_path / "base")
    a, b = adapter(base, tmp_path / "a", 1), adapter(base, tmp_path / "b", 2)
    called = combine.Factors.load

    def load(self, dtype):
        os.utime(b / "adapter_model.safetensors", ns=(1, 1))
        return called(self, dtype)

    monkeypatch.setattr(combine.Factors, "load", load)
    with pytest.raises(MergeError, match="b/adapter_model.safetensors changed while it was merged"):
        merge_linear([a, b], tmp_path / "out", base=tmp_path / "base", output="model")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_merge_of_other_options_is_discarded(tmp_path, monkeypatch):
    _, a, b = family(tmp_path)
    rule = writer._check_finite
    seen = []

    def fails(*args):
        seen.append(1)
        if len(seen) == 20:
            raise KeyboardInterrupt
        rule(*args)

    monkeypatch.setattr(writer, "_check_finite", fails)
    with pytest.raises(KeyboardInterrupt):
        merge_linear([a, b], tmp_path / "out", weights=[0.9, 0.1], max_shard_size="30KB")
    journal = json.loads((tmp_path / ".out.merging" / "journal.json").read_text())
    assert journal["finished"] and not (tmp_path / "out").exists()
    merge_linear([a, b], tmp_path / "out", weights=[0.5, 0.5], max_shard_size="30KB")
    merge_linear([a, b], tmp_path / "fresh", weights=[0.5, 0.5], max_shard_size="30KB")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_a_finished_merge_is_not_done_again(tmp_path, monkeypatch):
    _, a, b = family(tmp_path)
    merge_linear([a, b], tmp_path / "out")
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(writer, "_write_tensors", None)
    result = merge_linear([a, b], tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
    assert digest(tmp_path / "out") == {n: f["xxh3_128"] for n, f in result.report["files"].items()}


def test_an_old_output_that_a_crash_left_aside_comes_back(tmp_path):
    """Killed between the two renames of an overwrite: the old output is aside, the new one complete but not in place."""
    _, a, b = family(tmp_path)
    merge_linear([a, b], tmp_path / "out")
    old = digest(tmp_path / "out")
    (tmp_path / ".out.merging").mkdir()
    (tmp_path / "out").rename(tmp_path / ".out.merging" / "old")
    with pytest.raises(FileExistsError, match="out is not empty"):
        merge_linear([a, b], tmp_path / "out", weights=[0.9, 0.1])
    assert digest(tmp_path / "out") == old


def test_files_are_readable_as_the_umask_says(tmp_path):
    _, a, b = family(tmp_path)
    before = os.umask(0o022)
    try:
        merge_linear([a, b], tmp_path / "out")
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").iterdir()} == {"0o644"}
