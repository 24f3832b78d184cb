"""KLToBase: the divergence by hand and against full logits, ASFT and DFT, layouts, both sources, replayed rows."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from trl import SFTConfig, SFTTrainer

from hf_continual import ContinualConfig, ContinualTrainer, KLToBase, MaskSurprising, Method
from hf_continual.tensors import divergence
from hf_continual.tensors.divergence import full_divergence, opened, top_of, truncated_divergence
from tests import toy
from tests.methods.test_entropy_weighted import documents

CACHE = "build/test-base"
ZERO_TOLERANCE = 0.0
EXTRA_FORWARDS = 1  # the head is compared with the model's own logits
SHORTER = {"cache_dir": CACHE}
OLD = {"seed": 9, "low": 30, "high": 59}


def example(world):
    return KLToBase(weight=0.5, weighting="probability", top_k=8, cache_dir=CACHE)


def zero(world):
    return KLToBase(weight=0.0, cache_dir=CACHE)


def lora(**changes):
    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **changes)


@functools.cache
def random_lora():
    """An adapter that says something else than its base from the start."""
    return lora(init_lora_weights=False)


def built(folder, *methods, rows=None, peft=None, model=None, **settings):
    return ContinualTrainer(
        model or toy.model(), ContinualConfig(**toy.settings(folder, **settings)), train_dataset=rows or toy.rows(),
        processing_class=toy.tokenizer(), peft_config=peft, methods=methods,
    )  # fmt: skip


def kl(folder, **options):
    return KLToBase(**{"cache_dir": str(folder / "cache"), "top_k": len(toy.VOCABULARY), **options})


def first_log(trainer):
    return next(entry for entry in toy.logs(trainer) if "loss" in entry)


def test_numbers_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.125, 0.125]]), torch.tensor([[0.25, 0.25, 0.4, 0.1]])
    two = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.25 / 0.5)
    full = 0.5 * math.log(2) + 0.125 * math.log(0.125 / 0.4) + 0.125 * math.log(0.125 / 0.1)
    kept = top_of(p.log() + 2, 2)
    ids, logp = opened(kept)
    assert kept.dtype == torch.int32 and kept.shape == (1, 5) and ids.tolist() == [[0, 1]]
    torch.testing.assert_close(logp.exp(), torch.tensor([[0.5, 0.25, 0.25]]), rtol=1e-6, atol=0)
    identity = lambda logits: logits - 3  # noqa: E731 - hidden states that are the logits
    assert truncated_divergence(q.log(), identity, kept).item() == pytest.approx(two, abs=1e-6)
    assert truncated_divergence(q.log(), identity, top_of(p.log(), 4)).item() == pytest.approx(full, abs=1e-6)
    assert full_divergence(q.log(), identity, p.log(), identity).item() == pytest.approx(full, abs=1e-6)
    assert truncated_divergence(p.log(), identity, kept).item() == pytest.approx(0, abs=1e-7)


def test_truncation_only_lowers_it_and_all_tokens_are_the_full_one():
    g = torch.Generator().manual_seed(0)
    base, model = torch.randn(20, 30, generator=g) * 3, (torch.randn(20, 30, generator=g) * 3).requires_grad_()
    same = lambda logits: logits  # noqa: E731
    full = full_divergence(model, same, base, same)
    (wanted,) = torch.autograd.grad(full.sum(), model, retain_graph=True)
    torch.testing.assert_close(wanted, torch.softmax(model, -1) - torch.softmax(base, -1), rtol=1e-5, atol=1e-6)
    before = torch.full((20,), -1e-6)
    for k in (1, 2, 5, 10, 29, 30, 99):
        found = truncated_divergence(model, same, top_of(base, k))
        assert (found >= before - 1e-6).all() and (found <= full + 1e-5).all()
        before = found.detach()
        (gradient,) = torch.autograd.grad(found.sum(), model)
        assert torch.isfinite(gradient).all()
    torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_few_logits_exist_at_once(monkeypatch):
    monkeypatch.setattr(divergence, "TILE", 7)
    seen = []

    def head(hidden):
        seen.append(len(hidden))
        return hidden @ weight

    weight = torch.randn(4, 9)
    hidden = torch.randn(40, 4, requires_grad=True)
    kept = top_of(torch.randn(40, 9), 3)
    tiled = truncated_divergence(hidden, head, kept)
    tiled.sum().backward()
    assert max(seen) == 7 and sum(seen) == 80  # once forward, once in backward
    monkeypatch.setattr(divergence, "TILE", 256)
    torch.testing.assert_close(tiled, truncated_divergence(hidden, lambda h: h @ weight, kept))


LAYOUTS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 32},
    "padding-free": {"padding_free": True, "max_length": None},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", ["recorded", "adapter"])
def test_the_loss_is_that_of_full_logits(tmp_path, layout, source):
    """ASFT at the first step, of an adapter that differs from its base, document by document."""
    method = kl(tmp_path, weight=0.7, weighting="probability", source=source)
    trainer = built(tmp_path, method, peft=random_lora(), max_steps=1, **LAYOUTS[layout])
    batch = next(iter(trainer.get_train_dataloader()))
    model, total, probability, apart, count = trainer.model, 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        model.eval()
        for ids in documents(batch):
            logq = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)
            with model.disable_adapter():
                logp = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)
            said = logq.gather(-1, ids[1:, None])[:, 0]
            total -= float((said.exp() * said).sum())
            probability += float(said.exp().sum())
            apart += float((logp.exp() * (logp - logq)).sum())
            count += len(ids) - 1
    model.train()
    trainer.train()
    found = first_log(trainer)
    assert apart / count > 1e-3
    assert found["kl_to_base/kl"] == pytest.approx(apart / count, rel=1e-4)
    assert found["kl_to_base/term"] == pytest.approx(0.7 * apart / count, rel=1e-4)
    assert found["kl_to_base/probability"] == pytest.approx(probability / count, rel=1e-4)
    assert found["loss"] == pytest.approx((total + 0.7 * apart) / count, rel=1e-4)


@pytest.mark.parametrize("options", [{"top_k": 4}, {"source": "adapter"}])
def test_at_the_first_step_it_is_zero(tmp_path, options):
    trainer = built(tmp_path, kl(tmp_path, weight=2.0, **options), peft=lora(), learning_rate=1e-2)
    trainer.train()
    values = [entry["kl_to_base/kl"] for entry in toy.logs(trainer) if "loss" in entry]
    assert abs(values[0]) < 1e-6 < values[-1]


def test_both_sources_train_the_same_weights(tmp_path):
    found = []
    for source in ("recorded", "adapter"):
        trainer = built(tmp_path, kl(tmp_path, weight=3.0, source=source), peft=lora(), learning_rate=1e-2)
        trainer.train()
        found.append(torch.cat([p.detach().flatten() for p in trainer.run.named_parameters().values()]))
    free = built(tmp_path, peft=lora(), learning_rate=1e-2)
    free.train()
    plain = torch.cat([p.detach().flatten() for p in free.model.parameters() if p.requires_grad])
    assert (found[0] - plain).abs().max() > 1e-4
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


def test_without_the_kl_it_is_dft(tmp_path):
    """TRL's own loss_type='dft'; by SGD, since AdamW would enlarge the last digits of small gradients."""
    settings = {"optim": "sgd", "learning_rate": 5.0, "max_grad_norm": 0.0}
    theirs = SFTTrainer(
        toy.model(), SFTConfig(**toy.settings(tmp_path, loss_type="dft", **settings)),
        train_dataset=toy.rows("prompt_completion"), processing_class=toy.tokenizer(),
    )  # fmt: skip
    theirs.train()
    method = kl(tmp_path, weight=0.0, weighting="probability")
    ours = built(tmp_path, method, rows=toy.rows("prompt_completion"), **settings)
    ours.train()
    assert (toy.flat(theirs.model) - toy.flat(toy.model())).abs().max() > 1e-3
    torch.testing.assert_close(toy.flat(theirs.model), toy.flat(ours.model), rtol=0, atol=5e-6)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("rows", [None, "old"])
def test_accumulation_does_not_change_the_step(tmp_path, rows):
    found = []
    more = {} if rows is None else {"rows": toy.rows("prompt_completion", **OLD), "ratio": 0.4, "ce_weight": 0.5}
    for size, steps in ((4, 1), (2, 2)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "learning_rate": 5e-3}
        trainer = built(tmp_path, kl(tmp_path, weight=2.0, **more), rows=toy.rows("prompt_completion"), **settings)
        trainer.train()
        found.append((toy.flat(trainer.model), [e["loss"] for e in toy.logs(trainer) if "loss" in e]))
    if rows is None:  # replayed rows fall into other steps where micro-batches are smaller
        torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=5e-5)
        assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)


@pytest.mark.parametrize("source", ["recorded", "adapter"])
def test_the_kl_of_replayed_rows(tmp_path, source):
    """All rows in one step: the sum over the replayed tokens over the task's number of loss tokens."""
    old = toy.rows("prompt_completion", number=3, **OLD)
    method = kl(tmp_path, weight=2.0, rows=old, per_batch=3, source=source)
    trainer = built(tmp_path, method, rows=toy.rows("prompt_completion"), peft=random_lora(), max_steps=1)
    prepared, model, apart, count = trainer.mixer.rows[0], trainer.model.eval(), 0.0, 0
    with torch.no_grad():
        for row in prepared:
            ids, trained = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:] != -100
            logq = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1][trained], -1)
            with model.disable_adapter():
                logp = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1][trained], -1)
            apart, count = apart + float((logp.exp() * (logp - logq)).sum()), count + int(trained.sum())
    model.train()
    trainer.train()
    found = first_log(trainer)
    assert found["kl_to_base/kl"] == pytest.approx(apart / count, rel=1e-4)
    assert found["loss"] == pytest.approx(found["task/loss"] + found["kl_to_base/term"], rel=1e-4)


def test_tokens_that_are_masked_have_no_kl(tmp_path):
    """Whether the method that masks comes before or after."""
    mask, found = MaskSurprising(62.0, cache_dir=str(tmp_path / "cache")), []
    for methods in ([replace(mask), kl(tmp_path)], [kl(tmp_path), replace(mask)], [kl(tmp_path)]):
        trainer = built(tmp_path, *methods, peft=random_lora(), max_steps=1)
        trainer.train()
        found.append(first_log(trainer)["kl_to_base/kl"])
    assert found[0] == found[1] != found[2]


def test_a_larger_weight_holds_the_model_nearer(tmp_path):
    apart = []
    for weight in (0.01, 1.0, 30.0):
        trainer = built(tmp_path, kl(tmp_path, weight=weight, top_k=16), learning_rate=1e-2, max_steps=8)
        trainer.train()
        apart.append([entry["kl_to_base/kl"] for entry in toy.logs(trainer) if "loss" in entry][-1])
    assert apart[0] > apart[1] > 2 * apart[2], apart


class Shuffles(Method):
    """A method that changes the order of the rows."""

    name = "shuffles"

    def edit_rows(self, run, rows):
        return rows.select(range(len(rows) - 1, -1, -1))


def test_sentences(tmp_path):
    for wrong, kind, said in (
        ({"weight": -1.0}, ValueError, "must be a finite number of at least 0"),
        ({"weighting": "p"}, ValueError, "must be one of none, probability"),
        ({"source": "live"}, ValueError, "must be one of recorded, adapter"),
        ({"top_k": 0}, ValueError, "must be at least 1"),
        ({"source": "adapter", "reference": "task_start"}, ValueError, "with the adapter off the model is the base"),
        ({"ratio": 0.5}, ValueError, "without rows the KL is on the task's own tokens"),
        ({"rows": toy.rows()}, ValueError, "replayed rows need either ratio"),
        ({"rows": toy.rows(), "ratio": 1.5}, ValueError, "must lie between 0 and 1"),
        ({"rows": toy.rows(), "ratio": 0.5, "weight": 0.0}, ValueError, "rows that have no part in the loss"),
    ):
        with pytest.raises(kind, match=said):
            KLToBase(**wrong)
    with pytest.raises(ValueError, match="KLToBase weighs the tokens of the loss, and loss_type='dft' does so too"):
        built(tmp_path, kl(tmp_path, weighting="probability"), loss_type="dft")
    with pytest.raises(
        ValueError, match=r"source='adapter'\) switches an adapter off .* weights of LlamaForCausalLM itself"
    ):
        built(tmp_path, kl(tmp_path, source="adapter")).train()
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="this adapter puts tokens in front of each row"):
        built(tmp_path, kl(tmp_path, source="adapter"), peft=prompt).train()
    with pytest.raises(ValueError, match="another method changed tokens or order of the task's rows"):
        built(tmp_path, kl(tmp_path), Shuffles()).train()
    built(tmp_path, kl(tmp_path, source="adapter"), Shuffles(), peft=lora()).train()
    with pytest.raises(ValueError, match="with label_smoothing_factor the loss comes from elsewhere"):
        built(tmp_path, kl(tmp_path), label_smoothing_factor=0.1)
    blank = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, -100, -100]}] * 4)
    with pytest.raises(ValueError, match="none of the 4 rows has a token to predict"):
        built(tmp_path, kl(tmp_path), rows=blank).train()


def test_a_soft_prompt_and_a_resumed_run(tmp_path):
    """Virtual tokens in front of each row; and another base is refused."""
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    trainer = built(tmp_path, kl(tmp_path, reference="task_start"), peft=prompt, learning_rate=1e-2)
    trainer.train()
    assert abs(first_log(trainer)["kl_to_base/kl"]) < 1e-6
    settings = {"save_strategy": "steps", "save_steps": 2}
    built(tmp_path / "b", kl(tmp_path), **settings).train()
    other = built(tmp_path / "b", kl(tmp_path), model=toy.model(seed=1), **settings)
    with pytest.raises(ValueError, match="KLToBase: the run to resume began with another base"):
        other.train(resume_from_checkpoint=True)
