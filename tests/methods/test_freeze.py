"""FreezeLayers: the right blocks, really frozen, with adapters, checkpointing and quantised bases."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from trl import SFTConfig

from hf_continual import ContinualTrainer, FreezeLayers
from hf_continual.tasks import Task
from hf_continual.tensors.layers import find_blocks
from tests import toy
from tests.tensors.test_layers import FAMILIES, SMALL

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "freeze" / "frozen_params.json").read_text())


def example(world=None):
    return FreezeLayers(bottom=1)


def zero(world=None):
    return FreezeLayers(bottom=1, from_task=1)


ZERO_TOLERANCE = 0.0


def frozen_blocks(model):
    return [
        i for i, block in enumerate(find_blocks(model).modules) if not any(p.requires_grad for p in block.parameters())
    ]


@pytest.mark.parametrize("kind", FAMILIES)
def test_exact_blocks_on_every_family(kind):
    changes, _, embeddings = FAMILIES[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **changes}))
    FreezeLayers(bottom=2).prepare_model(model, Task())
    assert frozen_blocks(model) == [0, 1]
    inside = (*(f"{find_blocks(model).path}.{i}." for i in (0, 1)), *(f"{e}." for e in embeddings))
    wrong = [n for n, p in model.named_parameters() if p.requires_grad == n.startswith(inside)]
    assert not wrong


def official(name):
    layers = int(name.split("(")[1].split()[0])
    if name.startswith("pythia"):
        sizes = {"pythia-160m": (768, 12, 3072), "pythia-410m": (1024, 16, 4096)}[name.split()[0]]
        config = AutoConfig.for_model(
            "gpt_neox", vocab_size=50304, hidden_size=sizes[0], num_attention_heads=sizes[1],
            intermediate_size=sizes[2], num_hidden_layers=layers,
        )  # fmt: skip
    else:
        config = AutoConfig.for_model("llama", num_hidden_layers=layers, hidden_size=64, num_attention_heads=4)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_the_authors_substrings_freeze_what_was_recorded(name):
    for fact in GOLDEN["models"][name]["freeze_n"]:
        n = fact["n_layer_intended"]
        model = official(name)
        FreezeLayers(bottom=n, compatibility="official-substring").prepare_model(model, Task())
        assert frozen_blocks(model) == fact["layers_actually_frozen"]
        exact = official(name)
        FreezeLayers(bottom=n).prepare_model(exact, Task())
        assert frozen_blocks(exact) == list(range(n))


def build(folder, model=None, method=None, peft=None, **settings):
    extra = settings.pop("trainer", {})
    return ContinualTrainer(
        toy.model() if model is None else model,
        SFTConfig(**toy.settings(folder, **settings)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        peft_config=peft,
        methods=[] if method is None else [method],
        **extra,
    )


# Re-entrant checkpoints of frozen blocks have no input that requires a gradient, which is intended here.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
@pytest.mark.parametrize("sgd", [False, True])
def test_frozen_tensors_stay_bit_identical(tmp_path, sgd, checkpointing):
    optimizer = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1})}
    settings = {"weight_decay": 0.1, "activation_checkpointing": bool(checkpointing)}
    if checkpointing:
        settings["activation_checkpointing_kwargs"] = {"use_reentrant": checkpointing == "reentrant"}
    trainer = build(tmp_path, method=FreezeLayers(bottom=2), trainer=optimizer if sgd else {}, **settings)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        frozen = name.startswith(("model.embed_tokens", "model.layers.0.", "model.layers.1."))
        assert torch.equal(p, before[name]) == frozen, name
        assert (p.grad is None) or not frozen
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in trainer.model.parameters() if not p.requires_grad}
    assert not any(m._forward_pre_hooks for m in trainer.model.modules())


class Backward(torch.autograd.Function):
    """Passes its input through, and counts the backward passes that reach it."""

    count = 0

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        Backward.count += 1
        return grad


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_backward_runs_through_the_frozen_bottom(tmp_path, checkpointing, peft):
    def run(method):
        lora = LoraConfig(r=2, target_modules=["q_proj"]) if peft else None
        trainer = build(tmp_path, None, method, lora, activation_checkpointing=checkpointing, max_steps=1)
        base = trainer.model.get_base_model() if peft else trainer.model
        Backward.count = 0
        base.model.layers[1].register_forward_hook(lambda m, a, out: Backward.apply(out))
        trainer.train()
        return Backward.count, toy.flat(trainer.model)

    assert run(None)[0] == 1
    assert run(FreezeLayers(bottom=2))[0] == 0
    assert run(FreezeLayers(bottom=2, embeddings=False))[0] == (0 if peft else 1)  # it must reach the embeddings


def test_gradients_above_are_those_of_the_whole_model(tmp_path):
    """Cutting the graph does not change the gradients of trained weights."""
    grads = []
    for method in (None, FreezeLayers(bottom=2)):
        trainer = build(tmp_path, method=method, max_steps=1, max_grad_norm=0.0, activation_checkpointing=True)
        kept = {}
        for name, p in trainer.model.named_parameters():
            if name.startswith(("model.layers.2", "model.layers.3", "lm_head", "model.norm")):
                p.register_hook(lambda g, n=name, kept=kept: kept.__setitem__(n, g.clone()))
        trainer.train()
        grads.append(kept)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_from_task_learns_the_first_task_whole(caplog):
    model = toy.model()
    with caplog.at_level(logging.INFO):
        FreezeLayers(bottom=2, from_task=1).prepare_model(model, Task(index=0))
    assert frozen_blocks(model) == [] and "learned with all weights" in caplog.text
    FreezeLayers(bottom=2, from_task=1).prepare_model(model, Task(index=1))
    assert frozen_blocks(model) == [0, 1]


def test_tied_embeddings_are_a_clear_choice(tmp_path, caplog):
    tied = toy.model(tie_word_embeddings=True)
    FreezeLayers(bottom=1).prepare_model(tied, Task())
    assert "freezes the head too" in caplog.text and not tied.lm_head.weight.requires_grad
    free = toy.model(tie_word_embeddings=True)
    FreezeLayers(bottom=1, embeddings=False).prepare_model(free, Task())
    assert free.lm_head.weight.requires_grad
    trainer = build(tmp_path, toy.model(tie_word_embeddings=True), FreezeLayers(bottom=1, embeddings="untie"))
    trainer.train()
    model = trainer.model
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], "all-linear"])
def test_new_adapters_below_are_taken_off(tmp_path, targets):
    trainer = build(tmp_path, None, FreezeLayers(bottom=2), LoraConfig(r=2, target_modules=targets, lora_dropout=0.1))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert names and not [n for n in names if ".layers.0." in n or ".layers.1." in n]
    toy.model().save_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    ids = torch.arange(4, 20)[None]
    trainer.model.eval()
    again.eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trainer.model(ids).logits)


def test_adapters_that_learned_something_are_kept_and_frozen(tmp_path):
    first = build(tmp_path / "1", None, None, LoraConfig(r=2, target_modules=["q_proj"]))
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    toy.model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    second = build(tmp_path / "2", model, FreezeLayers(bottom=2), learning_rate=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
    second.train()
    for name, p in model.named_parameters():
        if "lora" in name:
            assert torch.equal(p, before[name]) == (".layers.0." in name or ".layers.1." in name), name


def test_regular_expressions_of_the_adapter_are_extended():
    model = get_peft_model(toy.model(), LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=".*layers.3.*"))
    FreezeLayers(bottom=1).prepare_model(model, Task())
    config = model.peft_config["default"]
    assert isinstance(config.exclude_modules, str)
    again = get_peft_model(
        toy.model(), LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=config.exclude_modules)
    )
    assert sorted(n for n, _ in again.named_parameters()) == sorted(n for n, _ in model.named_parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantised_base(tmp_path):
    from transformers import BitsAndBytesConfig

    toy.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
    )
    trainer = build(tmp_path, quantised, FreezeLayers(bottom=2), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.train()
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all(".layers.2." in n or ".layers.3." in n for n in trained)
    trainer.save_model(str(tmp_path / "adapter"))
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"bottom": -1}, ValueError, "at least 0"),
        ({"bottom": True}, TypeError, "must be a whole number, got bool"),
        ({"bottom": "3"}, TypeError, "must be a whole number, got str"),
        ({"bottom": 0, "embeddings": False}, ValueError, "freezes nothing"),
        ({"bottom": 1, "embeddings": "both"}, ValueError, "one of True, False, untie"),
        ({"bottom": 1, "compatibility": "x"}, ValueError, "official-substring"),
    ],
)
def test_sentences(options, error, said):
    with pytest.raises(error, match=said):
        FreezeLayers(**options)


def test_sentences_about_the_model():
    with pytest.raises(ValueError, match=r"bottom=5\): LlamaForCausalLM has 4 blocks"):
        FreezeLayers(bottom=5).prepare_model(toy.model(), Task())
    model = toy.model(tie_word_embeddings=True)
    model.model.norm.requires_grad_(False)
    with pytest.raises(ValueError, match="leaves no parameter"):
        FreezeLayers(bottom=4).prepare_model(model, Task())


@pytest.mark.parametrize(("bottom", "from_task"), [(2, 0), (2, 1)])
def test_it_logs_the_share_that_is_trained(tmp_path, bottom, from_task):
    model = toy.model()
    trainer = ContinualTrainer(
        model,
        SFTConfig(**toy.settings(tmp_path, max_steps=4, logging_steps=2)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        methods=[FreezeLayers(bottom=bottom, embeddings=True, from_task=from_task)],
    )
    trainer.train()
    shares = [e["freeze/trainable"] for e in trainer.state.log_history if "freeze/trainable" in e]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shares == pytest.approx([trained / sum(p.numel() for p in model.parameters())] * 2)
    assert (shares[0] == 1) == (from_task == 1)
