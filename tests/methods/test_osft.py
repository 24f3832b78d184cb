"""OSFT: projections by hand, the preserved part after 50 steps of AdamW, LoRA and 4-bit bases, resuming."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_continual import OSFT, ContinualConfig, ContinualTrainer
from hf_continual.tensors.base_weights import adapted_weight, linear_weights
from hf_continual.tensors.subspace import (
    Subspace,
    exact_products,
    moved,
    put_back_,
    remove_left_,
    remove_right_,
    top_subspace,
)
from tests import toy
from tests.methods.fake_run import FakeRun

LINEAR_ONLY = True
ZERO_TOLERANCE = 0.0
length = torch.linalg.vector_norm


def lora():
    """PEFT writes into a configuration, so that each adapter needs its own."""
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def example(world):
    return OSFT(preserve=0.5)


def zero(world):
    return OSFT(preserve=0.0)


def test_projections_by_hand():
    """W = diag(3, 1) in a 2 x 3 matrix: with R = 1, u = e1, s = 3, v = e1."""
    space = top_subspace(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), 1)
    assert space.U_OR.abs().tolist() == [[1.0], [0.0]] and space.s_R.tolist() == [3.0]
    assert space.V_IR.abs().tolist() == [[1.0], [0.0], [0.0]]
    gradient = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    remove_left_(gradient, space)
    assert gradient.tolist() == [[0.0, 0.0, 0.0], [4.0, 5.0, 6.0]]
    remove_right_(gradient, space)
    assert gradient.tolist() == [[0.0, 0.0, 0.0], [0.0, 5.0, 6.0]]
    weight = torch.tensor([[2.5, 0.5, 0.25], [-0.5, 7.0, 8.0]])
    torch.testing.assert_close(moved(weight, space), torch.tensor((0.5**2 + 0.5**2 + 0.25**2) ** 0.5 / 3))
    put_back_(weight, space)
    torch.testing.assert_close(weight, torch.tensor([[3.0, 0.0, 0.0], [0.0, 7.0, 8.0]]), rtol=0, atol=1e-6)
    assert moved(weight, space) < 1e-7


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (7, 12), (8, 8)])
def test_properties_of_the_projections(rows, columns):
    weight = matrix(rows, columns)
    space = top_subspace(weight, 3)
    change = matrix(rows, columns, 1)
    once = change.clone()
    remove_left_(once, space)
    remove_right_(once, space)
    U, V = space.U_OR, space.V_IR
    whole = (torch.eye(rows) - U @ U.T) @ change @ (torch.eye(columns) - V @ V.T)
    torch.testing.assert_close(once, whole, rtol=1e-5, atol=1e-6)
    assert length(U.T @ once) < 1e-6 and length(once @ V) < 1e-6
    after = weight + change  # putting back is projecting the change
    put_back_(after, space)
    torch.testing.assert_close(after, weight + once, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(
        top_subspace(after.double(), min(rows, columns)).s_R.max() >= space.s_R[0] - 1e-5, torch.tensor(True)
    )
    # The preserved pairs are still singular pairs of the changed weight.
    torch.testing.assert_close(after @ V, U * space.s_R, rtol=1e-5, atol=1e-5)
    # Rows on two processes give what one gives.
    halves = [slice(0, rows // 2), slice(rows // 2, rows)]
    products = sum(U[h].T @ change[h] for h in halves)
    for h in halves:
        part = change[h].clone()
        remove_left_(part, Subspace(U[h], space.s_R, V, add_up=lambda _: products))
        torch.testing.assert_close(part, (change - U @ (U.T @ change))[h], rtol=1e-5, atol=1e-6)


IDS = torch.randint(4, 60, (8, 12), generator=torch.Generator().manual_seed(1))


def fifty_steps(model, method, after=True, weight_decay=0.1):
    """Without a trainer: the parameters, where they started, and the method with its directions."""
    run = FakeRun(model)
    params = run.named_parameters()
    start = {n: p.detach().clone() for n, p in params.items()}
    method.prepare(run)
    method.begin_task(run)
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=weight_decay)
    for _ in range(50):
        model(input_ids=IDS, labels=IDS).loss.backward()
        method.edit_gradients(params)
        optimizer.step()
        if after:
            method.after_step(run)
        optimizer.zero_grad()
    return params, start, run


@pytest.mark.parametrize("layers", ["linear", "all"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_preserved_part_moves_by_less_than_1e_6_in_50_steps_of_adamw(weight_decay, layers):
    method = OSFT(preserve=0.5, layers=layers)
    params, start, run = fifty_steps(toy.model(), method, weight_decay=weight_decay)
    assert len(method._weights) == (28 if layers == "linear" else 30) and not method._factors
    for name, space in method._weights.items():
        change = params[name].detach() - start[name]
        assert moved(params[name].detach(), space) <= 1e-6, name
        assert length(params[name].detach() @ space.V_IR - space.U_OR * space.s_R) / length(space.s_R) <= 1e-6, name
        assert length(space.U_OR.T @ change) / length(change) <= 1e-6  # of the update, too
        assert length(change) > 0.05 * length(start[name])  # and the rest has learned
    assert method.measure(run)["preserved_moved"] <= 1e-6


def test_projecting_the_gradient_only_is_not_enough():
    """The reason for the second projection: what Adam makes of a projected gradient."""
    method = OSFT(preserve=0.5)
    params, _, _ = fifty_steps(toy.model(), method, after=False)
    assert max(moved(params[n].detach(), space) for n, space in method._weights.items()) > 0.1


def test_lora_does_not_act_in_the_preserved_directions():
    model = get_peft_model(toy.model(), lora())
    method = OSFT(preserve=0.5)
    params, _, run = fifty_steps(model, method)
    assert len(method._factors) == 28 and not method._weights
    for (a, b), space in method._factors.items():
        base = adapted_weight(model, a)
        torch.testing.assert_close(space.U_OR.T @ base, space.s_R[:, None] * space.V_IR.T, rtol=1e-4, atol=1e-5)
        product = params[b].detach() @ params[a].detach()
        assert length(product) > 1e-3
        for leak in (space.U_OR.T @ product, product @ space.V_IR):
            assert length(leak) / length(product) <= 1e-6, a
    assert method.measure(run)["preserved_moved"] <= 1e-6


def test_what_an_adapter_stands_on():
    """The base plus earlier adapters, as the layer computes without the trained one; also transposed layers."""
    model = get_peft_model(toy.model(), lora(), adapter_name="earlier")
    model.add_adapter("default", lora())
    model.base_model.set_adapter(["default", "earlier"])
    path = "base_model.model.model.layers.1.mlp.up_proj"
    layer = model.get_submodule(path)
    with torch.no_grad():
        layer.lora_B["earlier"].weight.normal_()
    weight = adapted_weight(model, f"{path}.lora_A.default.weight")
    x = matrix(3, 32)
    torch.testing.assert_close(x @ weight.T, layer(x).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weight, layer.get_base_layer().weight)
    assert "model.layers.1.mlp.up_proj.weight" in linear_weights(toy.model())
    assert "lm_head.weight" not in linear_weights(toy.model())


def train(folder, method, model=None, peft=None, **settings):
    trainer = ContinualTrainer(
        model or toy.model(), ContinualConfig(**toy.settings(folder, **settings)), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(), peft_config=peft, methods=[method],
    )  # fmt: skip
    trainer.train()
    return trainer


def product(model, layer, adapter="default"):
    found = model.get_submodule(layer)
    return (found.lora_B[adapter].weight @ found.lora_A[adapter].weight).detach().float()


def test_a_4_bit_base(tmp_path):
    """The directions are those of the dequantised weights; the adapter is in bfloat16, so that its rounding leaks."""
    toy.model(hidden_size=64, intermediate_size=128, num_key_value_heads=4).save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised, dtype=torch.float32)
    trainer = train(tmp_path / "out", OSFT(preserve=0.5), model, lora(), max_steps=6)
    path = "base_model.model.model.layers.2.self_attn.q_proj"
    weight = adapted_weight(trainer.model, f"{path}.lora_A.default.weight")
    assert weight.shape == (64, 64) and weight.dtype == torch.float32
    x = matrix(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            x @ weight.T, trainer.model.get_submodule(path).get_base_layer()(x), rtol=2e-2, atol=2e-2
        )
    space, change = top_subspace(weight, 32), product(trainer.model, path)
    assert length(change) > 0 and length(space.U_OR.T @ change) / length(change) < 1e-2
    plain = get_peft_model(toy.model(hidden_size=64, intermediate_size=128, num_key_value_heads=4), lora())
    A = plain.get_submodule(path).lora_A["default"].weight
    assert length(A @ space.V_IR) / length(A) > 0.5  # half of a random factor is there


KEPT = []


class Keeping(OSFT):
    """Shows its directions when the task ends."""

    def end_task(self, run):
        KEPT.append(self._weights or self._factors)
        super().end_task(run)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_resumed_run_has_the_same_directions(tmp_path, adapter):
    """They are computed again from the weights that training starts from, not from the checkpoint's."""

    def build(seed=0):
        settings = toy.settings(tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
        return ContinualTrainer(
            toy.model(seed=seed), ContinualConfig(**settings), train_dataset=toy.rows(), processing_class=toy.tokenizer(),
            peft_config=lora() if adapter else None, methods=[Keeping(preserve=[0.5, 0.7])],
        )  # fmt: skip

    KEPT.clear()
    straight, resumed = build(), build()
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
    one, other = KEPT
    assert len(one) == 28 and one.keys() == other.keys()
    for key, space in one.items():
        assert all(torch.equal(getattr(space, part), getattr(other[key], part)) for part in ("U_OR", "s_R", "V_IR"))
    with pytest.raises(ValueError, match="singular values of .* are not those that the run to resume started with"):
        build(seed=5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_one_share_per_task():
    method = OSFT(preserve=[0.0, 0.25, 0.75])
    assert [method.share(task) for task in range(5)] == [0.0, 0.25, 0.75, 0.75, 0.75]
    run = FakeRun(toy.model(), task=1)
    method.prepare(run)
    ranks = {space.s_R.numel() for space in method._weights.values()}
    assert ranks == {8, 4}  # of min(O, I) 32, and 16 for keys and values
    method.prepare(FakeRun(toy.model(), task=0))
    assert not method._weights


def test_an_adapter_trained_further(tmp_path, caplog):
    """One from OSFT continues; any other is refused, and a new one can be stacked on it."""
    toy.model().save_pretrained(tmp_path / "base")
    for name, methods in (("ours", [OSFT()]), ("plain", [])):
        trainer = ContinualTrainer(
            str(tmp_path / "base"), ContinualConfig(**toy.settings(tmp_path / name)), train_dataset=toy.rows(),
            processing_class=toy.tokenizer(), peft_config=lora(), methods=methods,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
    further = train(tmp_path / "a", OSFT(), str(tmp_path / "ours"))
    assert isinstance(further.model, PeftModel)
    with pytest.raises(ValueError, match="already acts in the preserved directions of its base"):
        train(tmp_path / "b", OSFT(), str(tmp_path / "plain"))
    stacked = train(tmp_path / "c", OSFT(), str(tmp_path / "plain"), lora())  # what the sentence advises
    path = "base_model.model.model.layers.0.mlp.down_proj"
    space = top_subspace(adapted_weight(stacked.model, f"{path}.lora_A.default.weight"), 16)
    change = product(stacked.model, path)
    assert length(space.U_OR.T @ change) / length(change) < 1e-5 < length(change)


def test_exact_products_restores_what_was_set():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError), exact_products():
            assert matmul.fp32_precision == "ieee"
            raise RuntimeError
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_sentences(tmp_path, caplog):
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"OSFT\(preserve=.*must lie between 0 and 1, 1 excluded"):
            OSFT(preserve=share)
    with pytest.raises(ValueError, match=r"OSFT\(preserve=\[\]\) is empty"):
        OSFT(preserve=[])
    with pytest.raises(ValueError, match=r"OSFT\(preserve=2\)"):
        OSFT(preserve=[0.5, 2])
    with pytest.raises(TypeError, match="must be a number"):
        OSFT(preserve="0.5")
    with pytest.raises(ValueError, match=r"OSFT\(layers='mlp'\) must be one of linear, all"):
        OSFT(layers="mlp")
    model = toy.model()
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name or "embed" in name)
    with pytest.raises(ValueError, match=r"none of the 10 trained parameters .*layers='all'"):
        train(tmp_path, OSFT(), model)
    with caplog.at_level(logging.INFO, logger="hf_continual.methods.osft"):
        train(tmp_path, OSFT(layers="all"), model, max_steps=1)  # what the sentence advises
    assert "osft: 0.5 of the directions of 1 weights are preserved" in caplog.text
    with pytest.raises(ValueError, match="use_dora=False"):
        train(tmp_path, OSFT(), peft=LoraConfig(r=2, target_modules="all-linear", use_dora=True))


def test_bfloat16_weights_leak_their_rounding():
    """As the docstring says: the reason to train float32 weights."""
    weight = nn.Parameter(matrix(32, 32).to(torch.bfloat16))
    space = top_subspace(weight.detach(), 16)
    with torch.no_grad():
        weight.add_(0.1 * matrix(32, 32, 1))
    put_back_(weight.detach(), space)
    assert 1e-6 < moved(weight.detach(), space) < 1e-2
