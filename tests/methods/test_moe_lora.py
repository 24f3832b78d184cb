"""MoELoRA: the published gate's numbers, the terms of the loss, one adapter for all experts, and what is loaded again."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_continual import ContinualConfig, ContinualTrainer, MoELoRA, load_moe_lora
from hf_continual.inference.kinds import for_task, tuner_of
from hf_continual.inference.moe_lora import MoELoraConfig
from hf_continual.methods.moe_lora import balance_loss, contrastive_loss, task_gate, token_gate
from hf_continual.tensors.rank_gates import mixed_delta
from tests import toy

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "baselines" / "moelora_taskgate.safetensors")

ZERO_TOLERANCE = 0.0
PLAIN_ADAPTER = LoraConfig(
    r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
)  # what zero strength is


def example(world):
    return MoELoRA(experts=2, gate="token", r=4, top_k=1, balance=0.1, contrastive=0.01)


def zero(world):
    return MoELoRA(experts=1, r=4)


def by_task(**changes):
    return MoELoRA(**{"experts": 2, "r": 4, "task_size": 8, **changes})


def train(start, folder, method, *, seed=1, **settings):
    trainer = ContinualTrainer(
        start, ContinualConfig(**toy.settings(folder, **settings)), train_dataset=toy.rows(seed=seed),
        processing_class=toy.tokenizer(), methods=[method],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture
def base(tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def test_the_published_gate_and_what_it_adds():
    g = GOLDEN
    weights = task_gate(g["gate_w"], g["task_emb"][g["task_id"]])
    torch.testing.assert_close(weights, g["expert_weight"], rtol=1e-6, atol=1e-7)
    A, B = torch.cat([g["A0"], g["A1"]]), torch.cat([g["B0"], g["B1"]], dim=1)
    found = mixed_delta(g["x"], A, B, weights[:, None], [2, 2], float(g["scaling"]))
    torch.testing.assert_close(found, g["delta_y"], rtol=1e-6, atol=1e-6)


def test_a_trained_layer_computes_the_published_numbers():
    """The same through PEFT's layer and the hooks: what is trained is what was compared."""
    g = GOLDEN
    model = get_peft_model(
        toy.model(), MoELoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], experts=2, task_size=3)
    )
    tuner = tuner_of(model)
    for name in "abcd":
        tuner.learn_task(name)
    layer, gate = next((n, m) for n, m in tuner.gates.items())[1].layer, next(iter(tuner.gates.values()))
    layer.base_layer = nn.Linear(6, 5, bias=False)
    nn.init.zeros_(layer.base_layer.weight)
    with torch.no_grad():
        layer.lora_A["default"].weight = nn.Parameter(torch.cat([g["A0"], g["A1"]]))
        layer.lora_B["default"].weight = nn.Parameter(torch.cat([g["B0"], g["B1"]], dim=1))
        gate.weight.copy_(g["gate_w"])
        for own, published in zip(gate.embeddings, g["task_emb"], strict=True):
            own.copy_(published)
    model.use_task(["abcd"[i] for i in g["task_id"].tolist()])
    torch.testing.assert_close(layer(g["x"]).detach(), g["delta_y"], rtol=1e-6, atol=1e-6)


def test_gate_by_token_is_the_sum_over_the_chosen_experts():
    draw = torch.Generator().manual_seed(1)
    x, router = torch.randn(2, 3, 6, generator=draw), torch.randn(4, 6, generator=draw)
    A, B = torch.randn(4, 2, 6, generator=draw), torch.randn(4, 5, 2, generator=draw)
    weights, _, chosen = token_gate(router, x, 2)
    assert (chosen.sum(-1) == 2).all() and torch.allclose(weights.sum(-1), torch.ones(2, 3))
    expected = torch.zeros(2, 3, 5)
    for b in range(2):
        for s in range(3):
            top = (router @ x[b, s]).softmax(0).topk(2)
            for p, e in zip(top.values / top.values.sum(), top.indices, strict=True):
                expected[b, s] += p * (B[e] @ (A[e] @ x[b, s]))
    found = mixed_delta(x, A.flatten(0, 1), B.permute(1, 0, 2).flatten(1), weights, [2] * 4, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_balance_is_k_where_the_load_is_even_and_grows_where_it_is_not():
    even = torch.full((8, 4), 0.25)
    chosen = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]] * 4).bool()
    assert float(balance_loss(even, chosen)) == pytest.approx(2)
    one = torch.tensor([[1.0, 0, 0, 0]] * 8)
    assert float(balance_loss(one, one.bool())) == pytest.approx(4)
    mask = torch.tensor([1, 1] + [0] * 6)
    mixed = torch.cat([even[:2], one[2:]])
    assert float(balance_loss(mixed, chosen, mask)) == pytest.approx(2)  # padding does not count


def test_the_contrastive_term_is_small_where_experts_differ():
    apart = torch.eye(4)[None].expand(6, 4, 4) * 3
    alike = torch.ones(6, 4, 4)
    assert contrastive_loss(apart) < 1.7 and contrastive_loss(alike) > 3  # log 5 is the least of 5 equal positives
    mask = torch.tensor([1, 1, 1, 0, 0, 0])
    shaken = torch.cat([apart[:3], torch.randn(3, 4, 4)])
    torch.testing.assert_close(contrastive_loss(shaken, mask_N=mask), contrastive_loss(apart[:3]))
    zeros = torch.zeros(6, 4, 4, requires_grad=True)  # as B begins
    (grad,) = torch.autograd.grad(contrastive_loss(zeros), zeros)
    assert (
        torch.isfinite(grad).all() and float(contrastive_loss(torch.randn(1, 4, 4))) == 0
    )  # one token has no positive


def test_one_expert_is_plain_lora(tmp_path):
    plain = SFTTrainer(
        toy.model(), SFTConfig(**toy.settings(tmp_path)), train_dataset=toy.rows(), processing_class=toy.tokenizer(),
        peft_config=copy.deepcopy(PLAIN_ADAPTER),
    )  # fmt: skip
    plain.train()
    ours = train(toy.model(), tmp_path, zero(None))
    assert torch.equal(toy.flat(plain.model), toy.flat(ours.model))


@pytest.mark.parametrize("gate", ["task", "token"])
def test_loaded_again_it_answers_and_generates_the_same(tmp_path, base, gate):
    method = by_task() if gate == "task" else example(None)
    trained = train(base, tmp_path / "0", method, max_steps=20, learning_rate=1e-2, task_name="law")
    loaded = load_moe_lora(tmp_path / "0")
    expected = trained.model.eval()(IDS).logits
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=1e-6)
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = loaded.generate(input_ids=ids, attention_mask=(ids > 0).long(), **options)
    alone = loaded.generate(input_ids=ids[:1, 2:], attention_mask=torch.ones(1, 2), **options)
    width = min(together.shape[1] - 4, alone.shape[1] - 2)
    assert torch.equal(together[0, 4 : 4 + width], alone[0, 2 : 2 + width])
    with pytest.raises(ValueError, match="cannot be merged"):
        loaded.merge_and_unload()


def test_each_task_has_its_gate(tmp_path, base):
    first = train(base, tmp_path / "0", by_task(), max_steps=10, learning_rate=1e-2, task_name="law")
    train(str(tmp_path / "0"), tmp_path / "1", by_task(), seed=2, max_steps=10, learning_rate=1e-2, task_name="tax")
    config = json.loads((tmp_path / "1" / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOE_LORA" and config["tasks"] == ["law", "tax"]
    now = load_file(tmp_path / "1" / "adapter_model.safetensors")
    for name, value in load_file(tmp_path / "0" / "adapter_model.safetensors").items():
        # The embedding of another task is not trained, whatever the experts and the gate do.
        assert torch.equal(value, now[name]) == ("embeddings.0" in name), name
    loaded = load_moe_lora(tmp_path / "1", task="law")
    law = loaded(IDS).logits
    loaded.use_task("tax")
    tax = loaded(IDS).logits
    assert (law - tax).abs().max() > 1e-4
    loaded.use_task(["law", "tax"])
    torch.testing.assert_close(loaded(IDS).logits, torch.stack([law[0], tax[1]]))
    for task, expected in (("law", law), ("unseen", tax), ("tax", tax)):
        with for_task(loaded, task):
            assert torch.equal(loaded(IDS).logits, expected)
    with pytest.raises(ValueError, match="No task is called 'fun': learned were law, tax"):
        loaded.use_task("fun")
    assert first.model.tasks == ["law"]


def test_the_terms_are_logged_and_padding_is_not_counted(tmp_path):
    trained = train(toy.model(), tmp_path, example(None), max_steps=2)
    entry = toy.logs(trained)[0]
    assert 0.1 * 0.9 < entry["moe_lora/balance"] < 0.1 * 2 and entry["moe_lora/contrastive"] > 0
    tuner = tuner_of(trained.model)
    tuner.wanted = frozenset(["balance"])
    row = IDS[:1]
    padded = torch.cat([row, torch.zeros(1, 4, dtype=torch.long)], dim=1)

    def balance(**inputs):
        trained.model.train()(**inputs)
        return float(tuner.terms()["balance"].detach())

    assert balance(input_ids=row) == pytest.approx(
        balance(input_ids=padded, attention_mask=(padded > 0).long()), rel=1e-5
    )
    trained.model.eval()(row)
    assert not tuner.terms()


def test_checkpointing_changes_nothing(tmp_path):
    settings = {"max_steps": 3, "learning_rate": 1e-2}
    plain = train(toy.model(), tmp_path / "a", example(None), **settings)
    again = train(
        toy.model(), tmp_path / "b", example(None), gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, **settings,
    )  # fmt: skip
    torch.testing.assert_close(toy.flat(plain.model), toy.flat(again.model), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="reentrant gradient checkpointing keeps no gradient"):
        train(
            toy.model(), tmp_path / "c", example(None), gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True}, **settings,
        )  # fmt: skip


def test_sentences(tmp_path, base):
    with pytest.raises(ValueError, match=r"r=6, experts=4.*Give r=8"):
        MoELoRA(r=6, experts=4)
    with pytest.raises(ValueError, match="cannot use more experts than there are"):
        MoELoRA(gate="token", experts=2, top_k=3)
    with pytest.raises(ValueError, match="no load to balance"):
        MoELoRA(balance=0.1)
    with pytest.raises(ValueError, match=r"gate='row'"):
        MoELoRA(gate="row")
    with pytest.raises(ValueError, match="model is a Linear without them"):
        by_task().prepare_model(nn.Linear(2, 2), None)
    with pytest.raises(ValueError, match="more than B A x"):
        train(toy.model(), tmp_path, by_task(target_modules="embed_tokens,q_proj"))
    train(base, tmp_path / "0", example(None))
    with pytest.raises(ValueError, match="trained with different sizes"):
        train(str(tmp_path / "0"), tmp_path / "1", MoELoRA(experts=4, gate="token", r=4, top_k=1))
    with pytest.raises(ValueError, match="The gate sees the token, and needs no task"):
        load_moe_lora(tmp_path / "0", task="law")
    assert isinstance(load_moe_lora(tmp_path / "0").get_base_model(), LlamaForCausalLM)
