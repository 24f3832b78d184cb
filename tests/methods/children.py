"""Runs that tests start in separate processes: `python -m tests.methods.children`, and under torchrun."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import datasets
import torch
from transformers import TrainerCallback
from trl import SFTConfig

from hf_continual import (
    EWC,
    KIF,
    LAMOL,
    LFPT5,
    MIGU,
    VRMCL,
    ContinualTrainer,
    EntropyWeighted,
    FreezeLayers,
    GeRe,
    GradientProjection,
    KLToBase,
    MaskSurprising,
    OnPolicyReplay,
    RecAdam,
    Replay,
    SlowWeights,
    TaskVector,
    TaSL,
)
from tests import toy


def methods():
    """All at once."""
    return [
        Replay(toy.rows(seed=9, low=30, high=59), ratio=0.3, weight=0.7),
        Replay(toy.rows(seed=12), per_batch=1, name="general"),
        GeRe(toy.rows(seed=14, low=20, high=50), ratio=0.1, weight=2.0, cache_dir="build/test-gere"),
        FreezeLayers(bottom=1),
        KIF(toy.rows(seed=16, low=20, high=50), inner_steps=3, outer_steps=2, outer_learning_rate=2e-3),
        RecAdam(k=1.0, t0=3, anchor_strength=100.0, floor=0.2),
    ]


def baselines():
    """Those that need no adapter; for EWC, TaSL, LAMOL, LFPT5 and OnPolicyReplay, what a first task does."""
    return [
        EWC(rows=8),
        MIGU(first_task=True),
        TaSL(),
        GradientProjection(runs=1, steps=2, since=0),
        TaskVector(at=3),
        LAMOL(gamma=0, lm_weight=0.3, gen_marker="w57", answer_marker="w58"),
        LFPT5(gamma=0, lm_weight=0.3, gen_marker="w57", answer_marker="w58"),
        OnPolicyReplay(share=0.2, max_new_tokens=4, temperature=1.0),
        VRMCL(inner_learning_rate=0.05, momentum=0.5),
        MaskSurprising(threshold=62.0, cache_dir="build/test-base"),
        EntropyWeighted(full_at=4.2),
        KLToBase(weight=0.5, weighting="probability", top_k=8, cache_dir="build/test-base"),
        SlowWeights(decay=0.6, every=2, warmup=0.25),
    ]


class Kill(TrainerCallback):
    """Ends the process as `kill -9` does, in the middle of a step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ.get("KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(folder: Path, more=(), **settings):
    """A trainer with all methods, and more, that saves every two steps."""
    return ContinualTrainer(
        toy.model(),
        SFTConfig(**toy.settings(folder, **{"max_steps": 8, "save_strategy": "steps", "save_steps": 2, **settings})),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        methods=[*methods(), *more],
        callbacks=[Kill()],
    )


def ranks(folder: Path, fsdp: bool) -> None:
    """Two processes, no accumulation; rank 0 writes the resulting weights."""
    from accelerate.utils import DistributedType

    settings = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2, "save_steps": 4}
    if fsdp:
        settings |= {
            "use_cpu": False,
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "reshard_after_forward": True,
                "state_dict_type": "FULL_STATE_DICT",
            },
        }
    trained = trainer(folder, **settings)
    kind = trained.accelerator.distributed_type
    assert trained.args.world_size == 2, trained.args.world_size
    assert kind == (DistributedType.FSDP if fsdp else DistributedType.MULTI_CPU), kind
    trained.train()
    if fsdp:
        from torch.distributed.tensor import DTensor

        assert all(isinstance(p, DTensor) for p in trained.model.parameters())
        weights = torch.cat([p.detach().full_tensor().flatten() for p in trained.model.parameters()])
    else:
        weights = toy.flat(trained.model)
    # Fusion puts every element on a side; all processes must agree.
    everyone = trained.accelerator.gather(weights[None])
    assert torch.equal(everyone[0], everyone[1])
    totals = trained.replay_totals()
    resumed = trainer(folder, **settings)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    again = [p.detach().full_tensor() if fsdp else p.detach() for p in resumed.model.parameters()]
    if trained.is_world_process_zero():
        torch.save(
            {
                "weights": weights,
                "resumed": torch.cat([p.flatten() for p in again]),
                "totals": totals.sum(axis=1).tolist(),
                "logs": toy.logs(trained),
            },
            folder / "result.pt",
        )


if __name__ == "__main__":
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    what, target = sys.argv[1], Path(sys.argv[2])
    if what == "train":
        trainer(target, baselines()).train()
    elif what == "ddp":
        ranks(target, fsdp=False)
    elif what == "fsdp2":
        from tests.methods import fsdp_on_cpu  # noqa: F401 - must come before any Accelerator

        ranks(target, fsdp=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # joins the threads of gloo; an exit while they run may abort
