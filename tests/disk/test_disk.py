"""Files that cannot be written: the error, that nothing is lost, and that the error's advice works."""

from __future__ import annotations

import errno
import subprocess

import pytest
import torch
from safetensors import SafetensorError
from trl import SFTConfig

from hf_continual import ContinualTrainer, RecAdam, Replay, kif_fuse, merge_linear, merge_with_recall, train_stream
from hf_continual.disk import CannotWrite, size, writing
from tests import toy
from tests.stream import world as plans

ERRORS = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "the quota is used up"),
    "safetensors": (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    "torch": (RuntimeError("[enforce fail at inline_container.cc:783] . unexpected pos 64 vs 0"), "the disk is full"),
    "numpy": (OSError("1536 requested and 992 written"), "the disk is full"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "out/x.json"), "the file system is read-only"),
    "rights": (PermissionError(errno.EACCES, "Permission denied", "out/x.json"), "no permission to write there"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_errors_of_every_library_become_one_sentence(tmp_path, monkeypatch, case, wrapped):
    monkeypatch.chdir(tmp_path)
    error, reason = ERRORS[case]
    with (
        pytest.raises(CannotWrite, match=f"could not be written: .*{reason}.*Do this.") as found,
        writing(tmp_path / "out", "Do this."),
    ):
        with writing(tmp_path / "out", "Of two, the outer one knows the way out."):
            if not wrapped:
                raise error
            try:
                raise error
            except (OSError, RuntimeError, SafetensorError) as inner:
                raise ValueError("Could not save the tokenizer") from inner
    assert "knows" not in str(found.value)
    assert (str(tmp_path / "out") if "out/x.json" not in str(error) else "out/x.json") in str(found.value)
    assert ("are free there" in str(found.value)) == (case not in ("read-only", "rights"))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("other"),
        PermissionError(errno.EACCES, "Permission denied", "/root/secret/rows.jsonl"),
        FileNotFoundError(errno.ENOENT, "No such file", "out/x"),
    ],
)
def test_other_errors_pass(tmp_path, error):
    with pytest.raises(type(error)) as found, writing(tmp_path / "a" / "out", "Do this."):
        raise error
    assert found.value is error


def test_sizes():
    assert [size(n) for n in (0, 999, 1500, 2.5e6, 25e6, 3e9)] == ["0 B", "999 B", "2 kB", "2.5 MB", "25 MB", "3.0 GB"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of a given number of kB, if this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes):
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a disk")
        return folder

    yield mount
    # Lazily: files that were read are still mapped into memory.
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def grow(folder):
    subprocess.run(["mount", "-o", "remount,size=50m", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [700, 900, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (800, 1100))])
def test_a_full_disk_while_checkpoints_are_written(tmp_path, small_disk, kilobytes):
    disk = small_disk(kilobytes)

    def build(folder):
        return ContinualTrainer(
            toy.model(),
            SFTConfig(**toy.settings(folder, max_steps=6, save_strategy="steps", save_steps=1)),
            train_dataset=toy.rows(),
            processing_class=toy.tokenizer(),
            methods=[Replay(toy.rows(seed=9), ratio=0.3), RecAdam(anneal="none", pull=0.01)],
        )

    straight = build(tmp_path / "straight")
    straight.train()
    told = r"could not be written: the disk is full .* are free there.*(checkpoint-\d is complete|No checkpoint is complete)"
    with pytest.raises(CannotWrite, match=told) as found:
        build(disk / "run").train()
    grow(disk)
    again = build(disk / "run")
    again.train(resume_from_checkpoint=None if "No checkpoint" in str(found.value) else True)
    assert torch.equal(toy.flat(again.model), toy.flat(straight.model))


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [650, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (16, 120, 400))])
def test_a_full_disk_while_a_plan_runs(tmp_path, small_disk, kilobytes):
    plan = plans.make(tmp_path, methods=[{"replay": {"rows": "earlier_tasks", "ratio": 0.3}}])
    disk = small_disk(kilobytes)
    with pytest.raises(CannotWrite, match="the disk is full.*Finished work stays in .*the same command resumes"):
        train_stream(plan, output_dir=str(disk / "o"))
    grow(disk)
    assert train_stream(plan, output_dir=str(disk / "o"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kilobytes"),
    [("linear", 100), ("linear", 190), ("recall", 12), ("recall", 190), ("kif", 20), ("kif", 160), ("kif", 215)],
)
def test_a_full_disk_while_a_merge_is_written(tmp_path, small_disk, kind, kilobytes):
    models = []
    for seed in range(3):
        models.append(str(tmp_path / f"m{seed}"))
        toy.model(seed).save_pretrained(models[-1])
        toy.tokenizer().save_pretrained(models[-1])
    rows = list(toy.rows(number=8))
    disk = small_disk(kilobytes)
    out = str(disk / "o")

    def merge():
        if kind == "linear":
            merge_linear(models[1:], out, progress=False)
        elif kind == "recall":
            texts = [row["text"] for row in rows]
            merge_with_recall(models[1:], out, base=models[0], calibration=texts, progress=False)
        else:
            kif_fuse(
                models[0], models[1], out, old=models[2], calibration_new=rows, calibration_old=rows, progress=False
            )

    with pytest.raises(CannotWrite, match=r"disk is full|are free") as found:
        merge()
    assert str(disk) in str(found.value) and not (disk / "o").exists()
    grow(disk)
    merge()
    assert (disk / "o" / "model.safetensors").is_file()
