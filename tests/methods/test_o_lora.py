"""O-LoRA: the published code's numbers, the closed form against autograd, and the stack of factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_continual import ContinualConfig, ContinualTrainer, OLoRA
from hf_continual.data.handover import HandOverError
from hf_continual.methods.o_lora import orthogonality, orthogonality_gradient
from hf_continual.tensors.concatenate import concatenate_adapters
from tests import toy
from tests.methods.fake_run import FakeRun

NUMBERS = Path(__file__).parents[1] / "golden" / "baselines"
GOLDEN = load_file(NUMBERS / "olora_losses.safetensors")

ZERO_TOLERANCE = 0.0
ADAPTERS_ONLY = True


def example(world):
    return OLoRA(weight=0.5, l2=0.3, product=0.01)


def zero(world):
    return OLoRA(weight=0.0)


def stand_in(params):
    return 0.01 * sum(p.square().sum() for p in params.values())


@pytest.mark.parametrize(("l1", "l2"), [(0.5, 0.0), (0.0, 0.3)])
def test_the_published_loss_and_gradients(l1, l2):
    params = {n.removeprefix("param/"): t.clone() for n, t in GOLDEN.items() if n.startswith("param/")}
    new = {n: p.requires_grad_() for n, p in params.items() if "loranew" in n}
    terms = l1 * sum(
        orthogonality(params[f"{m}.lora_A.default.weight"], params[f"{m}.loranew_A.default.weight"]) for m in "qv"
    ) + l2 * sum(p.norm() for p in new.values())
    loss = stand_in(params)
    key = f"l1={l1},l2={l2}"
    torch.testing.assert_close((loss + terms).detach(), GOLDEN[f"{key}/total_loss"][0], rtol=1e-6, atol=0)
    loss.backward()
    method = OLoRA(weight=l1, l2=l2)
    layers = {m: (f"{m}.loranew_A.default.weight", f"{m}.loranew_B.default.weight") for m in "qv"}
    method._pairs, method._live = layers, {m: params[f"{m}.lora_A.default.weight"] for m in "qv"}
    method.edit_gradients(new)
    for name, p in new.items():
        torch.testing.assert_close(p.grad, GOLDEN[f"{key}/grad/{name}"], rtol=1e-5, atol=1e-7)


def test_closed_forms_are_the_gradients():
    g = torch.Generator().manual_seed(3)
    old, new, b = (torch.randn(*shape, generator=g) for shape in ((6, 9), (2, 9), (5, 2)))
    (found,) = torch.autograd.grad(orthogonality(old, new.requires_grad_()), new)
    torch.testing.assert_close(orthogonality_gradient(old, new.detach()), found)
    a, b = nn.Parameter(new.detach()), nn.Parameter(b)
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    method = OLoRA(weight=0.0, product=0.25)
    method._pairs = {"m": ("a", "b")}
    method.edit_gradients({"a": a, "b": b})
    expected = torch.autograd.grad(0.25 * (b @ a).abs().sum(), (a, b))
    torch.testing.assert_close((a.grad, b.grad), expected)


def test_the_published_stack(tmp_path):
    """Theirs keeps the scaling alpha / r of each block; with alpha = r both are the factors end to end."""
    numbers = load_file(NUMBERS / "olora_concat.safetensors")
    for folder, adapter, rank in (("old", "lora", 4), ("new", "loranew", 2)):
        (tmp_path / folder).mkdir()
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q"]}
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(
            {f"base_model.model.q.lora_{f}.weight": numbers[f"in/q.{adapter}_{f}.default.weight"] for f in "AB"},
            tmp_path / folder / "adapter_model.safetensors",
        )
    concatenate_adapters(tmp_path / "old", tmp_path / "new", tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, numbers[name.replace("base_model.model.", "out/")])


def lora(rank=2):
    return LoraConfig(r=rank, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def base(tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def train(start, folder, method, *, seed=1, peft=None, **settings):
    config = ContinualConfig(**toy.settings(folder, **settings))
    trainer = ContinualTrainer(
        start, config, train_dataset=toy.rows(seed=seed), processing_class=toy.tokenizer(), peft_config=peft,
        methods=[method],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


def test_three_tasks_stack_into_one_plain_adapter(tmp_path, base):
    train(base, tmp_path / "0", OLoRA(), peft=lora())
    train(str(tmp_path / "0"), tmp_path / "1", OLoRA(), seed=2, peft=lora())
    last = train(str(tmp_path / "1"), tmp_path / "2", OLoRA(), seed=3, peft=lora(3))
    state = load_file(tmp_path / "2" / "continual" / "o_lora.safetensors")
    assert all(t.shape[0] == 7 for t in state.values())
    saved = load_file(tmp_path / "2" / "adapter_model.safetensors")
    for layer, factor in state.items():
        assert torch.equal(saved[f"base_model.model.{layer.removeprefix('A/')}.lora_A.weight"], factor)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "2").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    torch.testing.assert_close(loaded(ids).logits, last.model.eval()(ids).logits, rtol=0, atol=1e-6)


def test_weight_0_is_inc_lora_and_weight_makes_new_factors_orthogonal(tmp_path, base):
    train(base, tmp_path / "0", OLoRA(), peft=lora())
    old = load_file(tmp_path / "0" / "continual" / "o_lora.safetensors")

    def after(method):
        trained = train(str(tmp_path / "0"), tmp_path / "1", method, seed=2, peft=lora(), max_steps=20)
        names = {n: p.detach() for n, p in trained.model.named_parameters() if p.requires_grad}
        overlap = sum(
            float(
                orthogonality(old[f"A/{n.removeprefix('base_model.model.').removesuffix('.lora_A.default.weight')}"], p)
            )
            for n, p in names.items()
            if ".lora_A." in n
        )
        return names, overlap

    (plain, free), (incremental, _), (_, held) = (
        after(OLoRA(weight=0.0)), after(OLoRA(incremental=True)), after(OLoRA(weight=5.0)),
    )  # fmt: skip
    assert all(torch.equal(plain[n], incremental[n]) for n in plain)
    assert held < 0.9 * free


def test_merged_into_the_base_only_the_factors_are_needed(tmp_path, base):
    """The cost of a step then stays that of one adapter; another base is refused all the same."""
    train(base, tmp_path / "0", OLoRA(), peft=lora())
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "0").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    later = train(
        str(tmp_path / "merged"), tmp_path / "1", OLoRA(), seed=2, peft=lora(3), predecessor=str(tmp_path / "0")
    )
    assert all(t.shape[0] == 5 for t in later.task_states["o_lora"].values())
    assert later.methods.methods[0]._stacks
    saved = load_file(tmp_path / "1" / "adapter_model.safetensors")
    assert all(t.shape[0] == 3 for n, t in saved.items() if ".lora_A." in n)
    toy.model(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(HandOverError, match=r"the base 'base', and this run's base 'other' has different weights"):
        train(str(tmp_path / "other"), tmp_path / "2", OLoRA(), peft=lora(), predecessor=str(tmp_path / "0"))


def test_sentences(tmp_path, base):
    with pytest.raises(ValueError, match="IncLoRA, which has no terms"):
        OLoRA(incremental=True, weight=0.5)
    with pytest.raises(ValueError, match="works on LoRA adapters, but the model is a LlamaForCausalLM"):
        train(base, tmp_path / "full", OLoRA())
    train(base, tmp_path / "0", OLoRA(), peft=lora())
    with pytest.raises(ValueError, match="needs a new adapter for each task"):
        train(str(tmp_path / "0"), tmp_path / "1", OLoRA(), seed=2)
    spread = FakeRun(nn.Module())
    with pytest.raises(ValueError, match="no LoRA factor is trainable"):
        OLoRA().begin_task(spread)
    spread.named_parameters = lambda: {f"q.lora_{f}.default.weight": nn.Parameter(torch.ones(2, 2)) for f in "AB"}
    spread.is_sharded = True
    with pytest.raises(ValueError, match="needs whole factors, and they are sharded over processes"):
        OLoRA(l2=0.1).begin_task(spread)
    with pytest.raises(ValueError, match="has 32 columns, that of the earlier tasks 5"):
        method = OLoRA()
        method.load_task_state(
            {"A/model.layers.0.self_attn.q_proj": torch.ones(2, 5)},
            train(base, tmp_path / "2", OLoRA(), peft=lora()).run,
        )
