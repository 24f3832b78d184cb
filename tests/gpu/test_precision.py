"""Every method of the table trains on the device, in the precision that is used there."""

from __future__ import annotations

import pytest
import torch

from hf_continual import ContinualConfig, ContinualTrainer
from hf_continual.methods.table import TABLE
from tests import toy
from tests.gpu import runs
from tests.methods import covering

ON_CPU = ("replay", "recadam")  # the others' own files train them on the CPU


def train(folder, device, name, precision):
    given = covering.start([name])
    trainer = ContinualTrainer(
        given["model"], ContinualConfig(**runs.settings(folder, device, precision, max_steps=3)),
        train_dataset=toy.rows(), processing_class=toy.tokenizer(), peft_config=given["peft_config"],
        methods=[covering.example(name)],
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", TABLE)
def test_bf16_autocast(tmp_path, device, name):
    if device == "cpu" and name not in ON_CPU:
        pytest.skip("trained on the CPU by its own tests")
    torch.use_deterministic_algorithms(False)
    trainer = train(tmp_path, device, name, "bf16")
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    assert weights and all(torch.isfinite(p).all() and p.device.type == device for p in weights)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TABLE)
def test_deterministic_kernels(tmp_path, card, name):
    """No method needs a kernel that has no deterministic form, and two runs end alike."""
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (toy.flat(train(tmp_path / f"{i}", card, name, "fp32").model) for i in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(one, two)
