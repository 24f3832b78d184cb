"""EntropyWeighted: weights by hand, the loss of a step whatever the accumulation, and weights of several methods."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from hf_continual import ContinualConfig, ContinualTrainer, EntropyWeighted, GeRe, Method, Replay
from hf_continual.methods.entropy_weighted import entropy_weight
from tests import toy

ZERO_TOLERANCE = 0.0


def example(world):
    return EntropyWeighted(alpha=1.5, full_at=4.2)  # an untrained toy has an entropy of about 4.1 everywhere


def zero(world):
    return EntropyWeighted(alpha=0.0)


def built(folder, *methods, rows=None, **settings):
    return ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(folder, **settings)), train_dataset=rows or toy.rows(),
        processing_class=toy.tokenizer(), methods=methods,
    )  # fmt: skip


def test_numbers_by_hand():
    entropy = torch.tensor([0.0, 0.75, 1.5, 3.0, 9.0, -1e-7], requires_grad=True)
    assert entropy_weight(entropy, 1.0, 3.0).tolist() == [0.0, 0.25, 0.5, 1.0, 1.0, 0.0]
    assert entropy_weight(entropy, 2.0, 3.0).tolist() == [0.0, 0.0625, 0.25, 1.0, 1.0, 0.0]
    torch.testing.assert_close(entropy_weight(entropy, 0.5, 3.0)[1:3], torch.tensor([0.5, math.sqrt(0.5)]))
    assert entropy_weight(entropy, 0.0, 3.0).tolist() == [1.0] * 6
    assert not entropy_weight(entropy, 1.0, 3.0).requires_grad


@pytest.mark.parametrize(
    "layout", [{}, {"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}]
)
def test_the_loss_is_the_weighed_mean_of_full_logits(tmp_path, layout):
    """One step of plain SGD against the loss from full logits, document by document."""
    settings = {
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }
    trainer = built(tmp_path, EntropyWeighted(alpha=1.5, full_at=4.2), **settings, **layout)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    model = toy.model()
    total, count, weights = torch.zeros(()), 0, 0.0
    for ids in documents(batch):
        logp = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)
        entropy = -(logp.exp() * logp).sum(-1).detach()
        weight = (entropy / 4.2).clamp(max=1) ** 1.5
        total = total - (weight * logp.gather(-1, ids[1:, None])[:, 0]).sum()
        count, weights = count + len(ids) - 1, weights + float(weight.sum())
    (total / count).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    torch.testing.assert_close(toy.flat(trainer.model), toy.flat(model), rtol=0, atol=2e-6)
    said = toy.logs(trainer)[0]
    assert said["entropy_weighted/weight"] == pytest.approx(weights / count, rel=1e-5)
    assert said["loss"] == pytest.approx(total.item() / count, rel=1e-4)


def documents(batch):
    """The documents of a collated batch, padded or flattened."""
    ids = batch["input_ids"]
    if "position_ids" not in batch:
        return [row[mask.bool()] for row, mask in zip(ids, batch["attention_mask"], strict=True)]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    return [ids[0, a:b] for a, b in zip(starts, [*starts[1:], ids.shape[1]], strict=True)]


def test_accumulation_does_not_change_the_step(tmp_path):
    found = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = built(tmp_path, example(None), rows=toy.rows("prompt_completion"), **settings)
        trainer.train()
        found.append(toy.flat(trainer.model))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=2e-5)


@dataclass
class Half(Method):
    """Every token counts half."""

    name = "half"

    def weigh_tokens(self, forward):
        forward.note("tokens", forward.label_mask().sum())
        return torch.full_like(forward.token_loss_BS, 0.5)


@dataclass
class Sees(Method):
    """What a loss term is given."""

    name = "sees"

    def loss_terms(self, forward):
        forward.note("task", (forward.token_loss_BS * forward.label_mask()).sum(), forward.label_mask().sum())
        return {}


def test_weights_are_multiplied_and_terms_see_them(tmp_path):
    plain = built(tmp_path, Sees(), max_steps=1)
    plain.train()
    both = built(
        tmp_path, Sees(), Half(), EntropyWeighted(full_at=1e-9), max_steps=1
    )  # all of the latter's weights are 1
    both.train()
    one, two = toy.logs(plain)[0], toy.logs(both)[0]
    assert two["sees/task"] == pytest.approx(0.5 * one["sees/task"], rel=1e-6)
    assert two["loss"] == pytest.approx(0.5 * one["loss"], rel=1e-4) and two["half/tokens"] > 0
    quarter = built(tmp_path, Half(), second_half(), max_steps=1)
    quarter.train()
    assert toy.logs(quarter)[0]["loss"] == pytest.approx(0.25 * one["loss"], rel=1e-4)


def second_half():
    method = Half()
    method.name = "second"
    return method


def test_replayed_rows_are_not_weighed(tmp_path):
    """With GeRe's own mix of both losses, too."""
    old = toy.rows(seed=9, low=30, high=59)
    for other in (
        lambda: Replay(old, per_batch=2, weight=0.7),
        lambda: GeRe(old, per_batch=2, constraint="none", cache_dir=str(tmp_path / "c")),
    ):
        full, half = (built(tmp_path, other(), *more, max_steps=1) for more in ((), (Half(),)))
        for trainer in (full, half):
            trainer.train()
        one, two = (next(entry for entry in toy.logs(trainer) if "loss" in entry) for trainer in (full, half))
        name = "gere" if "gere/loss" in one else "replay"
        assert two[f"{name}/loss"] == one[f"{name}/loss"] and two["task/loss"] == one["task/loss"]  # plain likelihoods
        share = one[f"{name}/loss"] / 2 if name == "gere" else None
        if share is not None:  # 1/2 (CE_general + CE_task): only the second half is weighed
            assert two["loss"] == pytest.approx(share + one["task/loss"] / 4, rel=1e-3)
        else:
            assert 0.5 * one["loss"] < two["loss"] < one["loss"]


def test_sentences(tmp_path):
    for wrong, kind, said in (
        ({"alpha": -1.0}, ValueError, "must be a finite number of at least 0"),
        ({"alpha": "1"}, TypeError, "must be a number"),
        ({"full_at": 0}, ValueError, "must be above 0. It is an entropy in nats"),
        ({"name": "run"}, ValueError, "own files and logs use this name"),
    ):
        with pytest.raises(kind, match=said):
            EntropyWeighted(**wrong)
    with pytest.raises(
        ValueError, match="EntropyWeighted weighs the tokens of the loss, and loss_type='dft' does so too"
    ):
        built(tmp_path, EntropyWeighted(), loss_type="dft")
    with pytest.raises(ValueError, match="with label_smoothing_factor the loss comes from elsewhere"):
        built(tmp_path, EntropyWeighted(), label_smoothing_factor=0.1)
    plain = SFTTrainer(
        toy.model(), SFTConfig(**toy.settings(tmp_path, loss_type="dft")), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
    )  # fmt: skip
    plain.train()
    same = built(tmp_path, EntropyWeighted(alpha=0.0), loss_type="dft")  # it weighs nothing
    same.train()
    assert torch.equal(toy.flat(plain.model), toy.flat(same.model))
