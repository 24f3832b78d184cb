"""A step waits for the device no more often than SFTTrainer's, and needs no more memory."""

from __future__ import annotations

import warnings

import pytest
import torch
from trl import SFTTrainer

from hf_continual import KIF, ContinualTrainer, FreezeLayers, GeRe, MoFO, RecAdam, Replay
from tests import toy
from tests.gpu import runs

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
QUIET = {"logging_strategy": "no", "optim": "adamw_torch"}


def memory():
    return toy.rows(seed=9, low=30, high=59)


METHODS = {
    "none": lambda folder: [],
    "replay": lambda folder: [Replay(memory(), ratio=0.3)],
    "freeze": lambda folder: [FreezeLayers(bottom=1)],
    "recadam": lambda folder: [RecAdam(anneal="none", pull=0.01)],
    "mofo": lambda folder: [MoFO()],
    "gere": lambda folder: [GeRe(memory(), per_batch=1, cache_dir=str(folder / "cache"))],
    "kif": lambda folder: [KIF(memory(), inner_steps=20, outer_steps=1)],
}


def waits(trainer_class, folder, device, methods, steps):
    """Times that the host waited for the device in a run, as the profiler counts; on the CPU, times that a value was asked for."""
    trainer = runs.build(trainer_class, folder, device, *methods, max_steps=steps, **QUIET)
    if device == "cuda":
        both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=both) as seen:
            trainer.train()
        return sum(e.count for e in seen.key_averages() if e.key in WAITS)
    asked, item = [0], torch.Tensor.item

    def counted(tensor):
        asked[0] += 1
        return item(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "item", counted)
        trainer.train()
    return asked[0]


def per_step(trainer_class, folder, device, methods=lambda folder: []):
    """Waits of a step: those of a longer run on top of a shorter one's, so that a run's beginning and end do not count."""
    short, long = (
        waits(trainer_class, folder / f"{trainer_class.__name__}{n}", device, methods(folder), n) for n in (3, 9)
    )
    return (long - short) / 6


@pytest.mark.parametrize("name", METHODS)
def test_no_more_waits_than_sfttrainer(tmp_path, device, name, record_property):
    torch.use_deterministic_algorithms(False)
    plain = per_step(SFTTrainer, tmp_path, device)
    ours = per_step(ContinualTrainer, tmp_path, device, METHODS[name])
    record_property("waits_per_step", [plain, ours])
    assert 0 < plain and ours <= plain


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_no_more_synchronizing_calls(tmp_path, card, name, record_property):
    """The same, counted by CUDA's own debug mode, which sees copies to the host as well."""

    def calls(trainer_class, methods, steps):
        trainer = runs.build(
            trainer_class, tmp_path / f"{trainer_class.__name__}{steps}", card, *methods, max_steps=steps, **QUIET
        )
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer.train()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(w.message) for w in seen)

    torch.use_deterministic_algorithms(False)
    counted = {
        kind.__name__: (calls(kind, make(tmp_path), 9) - calls(kind, make(tmp_path), 3)) / 6
        for kind, make in ((SFTTrainer, METHODS["none"]), (ContinualTrainer, METHODS[name]))
    }
    record_property("synchronizing_calls_per_step", counted)
    assert counted["ContinualTrainer"] <= counted["SFTTrainer"]


@pytest.mark.gpu
def test_peak_memory(tmp_path, card, record_property):
    def peak(trainer_class, *methods):
        trainer = runs.build(trainer_class, tmp_path / trainer_class.__name__, card, *methods, config=wide, **QUIET)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.train()
        return torch.cuda.max_memory_allocated() - before, sum(p.nbytes for p in trainer.model.parameters())

    wide = {"hidden_size": 1024, "intermediate_size": 4096}
    torch.use_deterministic_algorithms(False)
    runs.SIZE = {**runs.SIZE, "cuda": {}}
    (plain, _), (ours, _) = peak(SFTTrainer), peak(ContinualTrainer)
    pulled, weights = peak(ContinualTrainer, RecAdam(anneal="none", pull=0.01))
    record_property("peak_bytes", {"SFTTrainer": plain, "ours": ours, "recadam": pulled, "weights": weights})
    assert ours <= 1.02 * plain
    assert pulled <= 1.05 * (plain + weights)  # the anchor, in the weights' dtype
