"""MIGU: the published masks, what counts as an activation, and which rows move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from hf_continual import KIF, MIGU, ContinualConfig, ContinualTrainer
from hf_continual.methods.migu import output_mask
from hf_continual.tensors.outputs import OutputSums, masked_weights
from tests import toy

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "baselines" / "migu_mask.safetensors")

LINEAR_ONLY = True
ZERO_TOLERANCE = 0.0
NEEDS_PREDECESSOR = True


def example(world):
    return MIGU(share=0.3, mask_a=True)


def zero(world):
    return MIGU(share=1.0)


def golden_layer():
    layer = nn.Linear(6, 10)
    layer.load_state_dict({n: GOLDEN[n] for n in ("weight", "bias")})
    return layer


def test_the_published_mask():
    """Two micro-batches of one step through the hooks."""
    layer = golden_layer()
    method = MIGU(share=0.3)
    method._sums = OutputSums(layer, masked_weights(layer), torch.device("cpu"))
    method._run = type("R", (), {"sum": staticmethod(lambda t: t)})
    for x in (GOLDEN["x1"], GOLDEN["x2"]):
        layer(x)
        method._sums.count()
    torch.testing.assert_close(method._sums._counted, GOLDEN["act_sum"], rtol=1e-6, atol=0)
    layer.weight.grad, layer.bias.grad = GOLDEN["grad_w"].clone(), GOLDEN["grad_b"].clone()
    method.edit_gradients(dict(layer.named_parameters()))
    assert torch.equal(layer.weight.grad, GOLDEN["masked_grad_w_0.7"]) and torch.equal(
        layer.bias.grad, GOLDEN["grad_b"]
    )
    assert torch.equal(output_mask(GOLDEN["act_sum"], 0.3), GOLDEN["mask_0.7"].bool())


@pytest.mark.parametrize("count", [1, 2, 10, 11, 64])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_masks_are_those_of_the_quantile(count, share):
    sums = torch.rand(3, count, generator=torch.Generator().manual_seed(count)).double()
    sums[1, : count // 2] = sums[1, 0]  # equal values
    expected = sums >= torch.quantile(sums, 1 - share, dim=1, keepdim=True) - 1e-12
    assert torch.equal(output_mask(sums, share), expected)
    with pytest.raises(ValueError, match=r"share=0\) must lie between 0 and 1"):
        output_mask(sums, 0)


def hooks_of(model):
    found = [h for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) for h in hooks.values()]
    return [h for h in found if hasattr(h, "__self__")]


def test_padding_evaluation_and_the_second_pass_of_checkpointing_do_not_count():
    model = toy.model().train()
    sums = OutputSums(model, masked_weights(model), torch.device("cpu"))
    row = torch.arange(4, 10)[None]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), row], dim=1)
    mask, places = (padded > 0).long(), torch.tensor([[1, 1, 1, *range(6)]])

    def heard(**inputs):
        model(use_cache=False, **inputs).logits.sum().backward()
        found = sums._heard.clone()
        sums.count()
        return found

    alone = heard(input_ids=row)
    together = heard(input_ids=padded, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        torch.testing.assert_close(heard(input_ids=row), alone)
    model.disable_input_require_grads()
    sums.clear()
    with torch.no_grad():
        model.eval()(input_ids=row)
    assert not sums._heard.any()
    sums.remove()
    assert not sums._handles and not any(type(hook.__self__) is OutputSums for hook in hooks_of(model))


def train(folder, method, start=None, peft=None, methods=(), **settings):
    trainer = ContinualTrainer(
        start or toy.model(), ContinualConfig(**toy.settings(folder, **settings)), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(), peft_config=peft, methods=[method, *methods],
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    return trainer, {n: (p.detach() != before[n]) for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_only_the_chosen_rows_move(tmp_path, share):
    """Without momentum and decay: one step of SGD."""
    method = MIGU(share=share, first_task=True)
    trainer, moved = train(tmp_path, method, max_steps=1, optim="sgd", learning_rate=0.1)
    for name, module in trainer.model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            rows = moved[f"{name}.weight"].any(dim=1)
            assert rows.sum() == round(share * (len(rows) - 1) + 0.49), name
    assert moved["model.norm.weight"].all() and moved["lm_head.weight"].any(dim=1).all()


def test_lora_masks_rows_of_b_by_the_combined_output(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    for mask_a in (False, True):
        method = MIGU(share=0.5, mask_a=mask_a, first_task=True)
        _, moved = train(tmp_path, method, peft=lora, **settings)
        for name, change in moved.items():
            if ".lora_B." in name:
                assert change.any(dim=1).sum() == round(0.5 * (len(change) - 1) + 0.49), name
    plain, _ = train(tmp_path, MIGU(share=0.5), peft=lora, **settings)
    assert not plain.methods.methods[0]._sums and plain.task_states["migu"] == {"tasks": 1}


def test_passes_of_other_methods_do_not_count(tmp_path):
    """KIF's outer steps run through the same layers between two steps."""
    method, counts = MIGU(share=0.5, first_task=True), []
    edit = method.edit_gradients

    def counted(params):
        counts.append(method._sums._passes)
        edit(params)

    method.edit_gradients = counted
    kif = KIF(toy.rows(seed=5), inner_steps=1, outer_steps=2)
    trainer = ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(tmp_path, gradient_accumulation_steps=2, max_steps=3)),
        train_dataset=toy.rows(), processing_class=toy.tokenizer(), methods=[method, kif],
    )  # fmt: skip
    method.edit_gradients = counted
    trainer.train()
    assert counts == [2, 2, 2]


def test_sentences(tmp_path):
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=r"MIGU\(share=.*must lie between 0 and 1, 0 excluded"):
            MIGU(share=share)
    with pytest.raises(ValueError, match="no weight of a linear layer is trained"):
        lora = LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
        train(tmp_path, MIGU(first_task=True), peft=lora)
    sums = OutputSums(toy.model(), masked_weights(toy.model()), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="Train without torch_compile"):
        next(sums.groups(lambda t: t))
