"""Task vector: the published formula in the run, and on checkpoints through the merging engine."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from hf_continual import ContinualConfig, ContinualTrainer, TaskVector, task_arithmetic
from tests import toy

ZERO_TOLERANCE = 0.0


def example(world):
    return TaskVector(at=0.5, alpha=0.3)


def zero(world):
    return TaskVector(alpha=0.0)


def train(start, folder, method, peft=None, **settings):
    trainer = ContinualTrainer(
        start, ContinualConfig(**toy.settings(folder, **settings)), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(), peft_config=peft, methods=[method],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize(("at", "step"), [(4, 4), (0.5, 3), (0.01, 1)])
def test_in_the_run_and_on_its_checkpoints(tmp_path, at, step):
    """theta' = theta - alpha v, from the checkpoints of the plain run by hand and by task arithmetic."""
    toy.model().save_pretrained(tmp_path / "base")
    toy.tokenizer().save_pretrained(tmp_path / "base")
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    train(str(tmp_path / "base"), tmp_path / "plain", TaskVector(alpha=0.0), **settings)
    train(str(tmp_path / "base"), tmp_path / "ours", TaskVector(at=at, alpha=0.3), **settings)
    start, early, end, ours = (
        load_file(tmp_path / f / "model.safetensors") for f in ("base", f"plain/checkpoint-{step}", "plain", "ours")
    )
    for name, w in end.items():
        torch.testing.assert_close(ours[name], w - 0.3 * (early[name] - start[name]), rtol=0, atol=2e-7)
    if at == 4:
        models = [str(tmp_path / "plain"), str(tmp_path / "plain" / f"checkpoint-{step}")]
        task_arithmetic(models, tmp_path / "merged", base=str(tmp_path / "base"), scale=[1.0, -0.3])
        for name, w in load_file(tmp_path / "merged" / "model.safetensors").items():
            torch.testing.assert_close(ours[name], w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("saved", [2, 3, 4])
def test_resumed_before_at_and_after_the_step(tmp_path, saved):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "peft": lora}
    straight = train(toy.model(), tmp_path / "a", TaskVector(at=3, alpha=0.3), **settings)
    held = (tmp_path / "a" / f"checkpoint-{saved}" / "continual" / "task_vector.safetensors").is_file()
    assert held == (saved >= 3)
    resumed = ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(tmp_path / "a", **{k: v for k, v in settings.items() if k != "peft"})),
        train_dataset=toy.rows(), processing_class=toy.tokenizer(), peft_config=lora,
        methods=[TaskVector(at=3, alpha=0.3)],
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{saved}"))
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))


def test_sentences(tmp_path):
    for wrong, error, said in (
        ({"at": 0}, ValueError, "must be at least 1"),
        ({"at": 2.5}, TypeError, "must be a whole number"),
        ({"at": "half"}, TypeError, "must be a number"),
        ({"alpha": -1.0}, ValueError, "at least 0"),
    ):
        with pytest.raises(error, match=said):
            TaskVector(**wrong)
    with pytest.raises(ValueError, match=r"the run has 4 steps, and the vector must end before the last one"):
        train(toy.model(), tmp_path, TaskVector(at=4))
