"""A head's logits are the model's own, for families that scale or cap them and for heads with a bias."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model

from hf_continual.evaluation.prompts import decoder
from hf_continual.tensors.head import Finish, finish_of, head_differs, head_tensors, logits_function, recorded_logits

SMALL = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, initializer_range=0.5)  # fmt: skip
FAMILIES = {
    "llama": (t.LlamaForCausalLM, t.LlamaConfig, {}, Finish()),
    "granite": (t.GraniteForCausalLM, t.GraniteConfig, {"logits_scaling": 6.0}, Finish(1 / 6.0)),
    "hyperclovax": (t.HyperCLOVAXForCausalLM, t.HyperCLOVAXConfig, {"logits_scaling": 3.0, "head_dim": 8}, Finish(3.0)),
    "cohere": (t.CohereForCausalLM, t.CohereConfig, {"logit_scale": 0.25}, Finish(0.25)),
    "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config, {"final_logit_softcapping": 2.0, "head_dim": 8}, Finish(cap=2.0)),
    "phi": (t.PhiForCausalLM, t.PhiConfig, {}, Finish()),
}


def build(family):
    cls, config, more, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = cls(config(**{**SMALL, **more})).eval()
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias, std=3.0)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [False, True])
def test_logits_are_the_models_own(family, adapter):
    model = build(family)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert finish_of(model) == FAMILIES[family][3]
    body, logits = decoder(model)
    ids = torch.randint(0, 40, (2, 7))
    with torch.no_grad():
        hidden, wanted = body(ids).last_hidden_state, model(ids).logits
        torch.testing.assert_close(logits(hidden), wanted, rtol=1e-5, atol=1e-5)
        kept = recorded_logits(*head_tensors(model).values(), finish=finish_of(model))
        assert float((kept(hidden).float() - wanted).abs().max()) < 0.05 * float(wanted.std())
        assert head_differs(model, hidden[0], wanted[0]) is None


def test_a_head_that_does_more_is_noticed():
    torch.manual_seed(0)
    model = build("llama")
    ids = torch.randint(0, 40, (1, 7))
    with torch.no_grad():
        hidden, logits = model.base_model(ids).last_hidden_state[0], model(ids).logits[0]
        said = head_differs(model, hidden, 2 * logits)
        assert said is not None and "LlamaForCausalLM differ from the model's own by up to" in said
        assert "returns 30 logits, but its head has 40 rows" in (head_differs(model, hidden, logits[:, :30]) or "")


def test_gradients_reach_states_and_head():
    model = build("gemma2")
    hidden = torch.randn(3, 16, requires_grad=True)
    logits_function(model)(hidden).square().sum().backward()
    assert hidden.grad.abs().sum() > 0 and model.lm_head.weight.grad.abs().sum() > 0
