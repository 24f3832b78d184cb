"""Modules below the frozen blocks: every weight reported as trained gets a gradient, and no other moves."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from trl import SFTConfig, SFTTrainer

from hf_continual import KIF, ContinualConfig, ContinualTrainer, FreezeLayers, GeRe, RecAdam, Replay
from hf_continual.tasks import Task
from hf_continual.tensors.layers import find_blocks, modules_below, towers
from tests import toy
from tests.families.configs import build
from tests.methods.fake_run import FakeRun
from tests.methods.test_freeze import build as trainer_of

PICTURE = 61


def llava():
    text = toy.model().config
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_id=PICTURE, vision_feature_layer=-1)
    )


def batch(pictures=False):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 60, (2, 10), generator=g)
    if not pictures:
        return {"input_ids": ids, "labels": ids, "use_cache": False}
    ids[:, 1:5] = PICTURE
    pixels = torch.rand(2, 3, 8, 8, generator=g)
    return {"input_ids": ids, "labels": ids, "pixel_values": pixels, "use_cache": False}


def backward(model, inputs):
    """Names of the parameters that get a gradient other than zero."""
    model.train()
    model.zero_grad()
    model(**inputs).loss.backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def frozen(model, inputs, method=None, checkpointing=None):
    """Freeze, run one backward pass, and check that exactly the trainable weights get a gradient. Returns the frozen names."""
    method = FreezeLayers(bottom=1) if method is None else method
    method.prepare_model(model, Task())
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    method.begin_task(FakeRun(model))
    got = backward(model, inputs)
    method.release()
    assert got == {n for n, p in model.named_parameters() if p.requires_grad}
    return {n for n, p in model.named_parameters() if not p.requires_grad}


def said(caplog):
    """The counts that were logged: parameters trained, and trained by images only."""
    trained = re.search(r"(\d+) are trained", caplog.text)
    more = re.search(r"(\d+) more parameters", caplog.text)
    return int(trained[1]), int(more[1]) if more else 0


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "checkpointing", "reentrant"])
@pytest.mark.parametrize("projector", [True, False])
def test_a_vision_tower_is_trained_as_without_the_method(projector, checkpointing, caplog):
    model, plain = llava(), llava()
    for m in (model, plain):
        m.model.vision_tower.requires_grad_(False)
        m.model.multi_modal_projector.requires_grad_(projector)
    with caplog.at_level(logging.INFO):
        kept = frozen(model, batch(pictures=True), checkpointing=checkpointing)
    text = {n for n in kept if "vision_tower" not in n}
    assert any(".layers.0." in n for n in text) and not any(".layers.1." in n for n in text)
    assert any("multi_modal_projector" in n for n in text) != projector
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(said(caplog)) == size
    assert said(caplog)[1] == (sum(p.numel() for p in model.model.multi_modal_projector.parameters()) * projector)
    backward(plain, batch(pictures=True))
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_text_alone_trains_what_the_log_says(caplog):
    model = llava()
    with caplog.at_level(logging.INFO):
        FreezeLayers(bottom=2).prepare_model(model, Task())
    got = backward(model, batch())
    assert said(caplog)[0] == sum(p.numel() for n, p in model.named_parameters() if n in got)
    assert "model.vision_tower, model.multi_modal_projector" in caplog.text
    assert model.model.vision_tower.embeddings.position_embedding.weight.requires_grad


def test_everything_between_ids_and_blocks_is_frozen():
    """Gemma3n projects its embeddings for each layer, and copies them for AltUp, before the first block."""
    model = build("gemma3n_text")
    for p in model.parameters():  # some factors start at zero, and nothing would pass through them
        torch.nn.init.normal_(p, std=0.2)
    names = {n.rpartition(".weight")[0] for n in frozen(model, batch()) if ".layers." not in n}
    assert names == {
        "model.embed_tokens", "model.embed_tokens_per_layer", "model.per_layer_model_projection",
        "model.per_layer_projection_norm", "model.altup_projections.0",
    }  # fmt: skip


def test_a_norm_above_the_blocks_is_trained_whatever_its_name():
    model = build("lfm2")
    frozen(model, batch())
    assert model.model.embedding_norm.weight.requires_grad


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_cross_attention_that_text_skips_does_not_end_the_gradient():
    model = build("mllama")
    method = FreezeLayers(bottom=1)
    method.prepare_model(model, Task())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    method.begin_task(FakeRun(model))
    got = backward(model, batch())
    assert any("layers.2." in n for n in got) and not any("layers.0." in n for n in got)


def test_looking_at_a_model_changes_nothing():
    model = toy.model()
    model.train()
    model.model.layers[2].eval()
    state = torch.get_rng_state()
    assert list(modules_below(model)) == ["model.embed_tokens"] and towers(model) == {}
    assert torch.equal(state, torch.get_rng_state())
    assert [m for m in model.modules() if not m.training] == list(model.model.layers[2].modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_without_values_names_tell():
    config = AutoConfig.for_model("bloom", vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert list(modules_below(model)) == ["transformer.word_embeddings", "transformer.word_embeddings_layernorm"]


# ------------------------------------------------------------------------------------------ adapters

NEW = [60, 61]


def new_tokens():
    ids = batch()["input_ids"].clone()
    ids[:, ::4], ids[:, 1::4] = NEW
    return {"input_ids": ids, "labels": ids, "use_cache": False}


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_are_learned(tied, caplog):
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": NEW})
    model = get_peft_model(toy.model(tie_word_embeddings=tied), lora)
    torch.nn.init.normal_(model.get_parameter("base_model.model.model.layers.3.self_attn.q_proj.lora_B.default.weight"))
    method = FreezeLayers(bottom=1)
    with caplog.at_level(logging.INFO):
        method.prepare_model(model, Task())
    model.enable_input_require_grads()
    method.begin_task(FakeRun(model))
    assert any("trainable_tokens_delta" in n for n in backward(model, new_tokens()))
    assert "listed in trainable_token_indices stay trainable" in caplog.text
    assert not any(".layers.0." in n for n, p in model.named_parameters() if p.requires_grad)


def saved_copies():
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    return get_peft_model(toy.model(), lora)


def test_a_copy_of_the_embeddings_is_a_contradiction():
    with pytest.raises(ValueError, match=r"freezes model\.embed_tokens, but the adapter's modules_to_save") as error:
        FreezeLayers(bottom=1).prepare_model(saved_copies(), Task())
    assert "embeddings=False" in str(error.value)
    model, method = saved_copies(), FreezeLayers(bottom=1, embeddings=False)
    method.prepare_model(model, Task())
    method.begin_task(FakeRun(model))
    assert any("embed_tokens.modules_to_save" in n for n in backward(model, batch()))


def test_a_copy_that_an_earlier_task_trained_is_frozen():
    model = saved_copies()
    wrapper = model.get_base_model().model.embed_tokens
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight[5] += 1
    FreezeLayers(bottom=1).prepare_model(model, Task(index=1))
    assert not any(p.requires_grad for p in wrapper.parameters())


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "prefix"])
def test_soft_prompts_are_trained(kind, tmp_path, caplog):
    config = {
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]
    with caplog.at_level(logging.INFO):
        trainer = trainer_of(tmp_path, None, FreezeLayers(bottom=2), config, learning_rate=0.1)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert trained and moved == trained
    assert said(caplog)[0] == sum(before[n].numel() for n in trained)


def experts():
    return build("qwen3_moe")


FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def moe_lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "target_parameters": FUSED, **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"target_modules": []}, {"target_parameters": FUSED[:1]}], ids=["both", "experts", "one"]
)
def test_adapters_of_fused_experts_below_are_taken_off(changes, tmp_path):
    """The saved adapter loads to the same model: no adapter in the frozen block, the trained ones above."""
    experts().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = trainer_of(tmp_path, base, FreezeLayers(bottom=1), moe_lora(**changes), learning_rate=0.05)
    assert not any("lora" in n for n, _ in trainer.model.named_parameters() if ".layers.0." in n)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in trainer.model.named_parameters()}
    trainer.model.eval()
    with torch.no_grad():
        ids = batch()["input_ids"]
        assert torch.equal(again.eval()(ids).logits, trainer.model(ids).logits)
        assert not torch.equal(base.model.layers[1].mlp.experts(*routed()), plain_experts(tmp_path)(*routed()))


def routed():
    return torch.ones(2, 32), torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5)


def plain_experts(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base").model.layers[1].mlp.experts


def test_trained_adapters_of_fused_experts_are_kept():
    """One of two nested adapters has learned something: both stay, frozen."""
    model = get_peft_model(experts(), moe_lora())
    below = [n for n, _ in model.named_parameters() if ".layers.0.mlp" in n and "lora_" in n]
    assert len(below) == 4
    with torch.no_grad():
        model.get_parameter(next(n for n in below if "lora_B" in n)).fill_(0.1)
    FreezeLayers(bottom=1).prepare_model(model, Task())
    kept = {n: p.requires_grad for n, p in model.named_parameters() if ".layers.0." in n and "lora_" in n}
    assert set(kept) == set(below) and not any(kept.values())
    assert model.peft_config["default"].target_parameters == set(FUSED)


def test_every_adapter_says_what_was_taken_off():
    model = get_peft_model(toy.model(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    FreezeLayers(bottom=1).prepare_model(model, Task())
    for name in ("first", "second"):
        assert model.peft_config[name].exclude_modules == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("embeddings", [True, False])
def test_an_adapter_of_the_embeddings(embeddings, tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = trainer_of(tmp_path, base, FreezeLayers(bottom=1, embeddings=embeddings), lora, learning_rate=0.05)
    adapters = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "embed_tokens.lora" in n}
    assert bool(adapters) != embeddings
    trainer.train()
    assert all(not torch.equal(trainer.model.get_parameter(n), p) for n, p in adapters.items())
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        ids = batch()["input_ids"]
        assert torch.equal(again.eval()(ids).logits, trainer.model.eval()(ids).logits)


# ------------------------------------------------------------------------------------------ nothing left to train


@pytest.mark.parametrize(
    ("lora", "freeze", "advice", "followed"),
    [
        ({"layers_to_transform": [0, 2]}, {"bottom": 4}, "freeze 2 or fewer blocks", {"bottom": 2}),
        ({"layers_to_transform": [0]}, {"bottom": 1}, "let the adapter reach higher blocks", None),
        ({"target_modules": ["embed_tokens"]}, {"bottom": 0}, "give embeddings=False", {"bottom": 1, "embeddings": False}),
    ],
)  # fmt: skip
def test_the_advice_works_where_nothing_would_be_trained(lora, freeze, advice, followed):
    def model():
        return get_peft_model(toy.model(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **lora}))

    refused = model()
    before = {n: p.requires_grad for n, p in refused.named_parameters()}
    with pytest.raises(ValueError, match="leaves no parameter") as error:
        FreezeLayers(**freeze).prepare_model(refused, Task())
    assert advice in str(error.value)
    assert {n: p.requires_grad for n, p in refused.named_parameters()} == before
    if followed:
        FreezeLayers(**followed).prepare_model(refused, Task())
        assert any(p.requires_grad for p in refused.parameters())
    else:
        higher = get_peft_model(toy.model(), LoraConfig(r=2, target_modules=["q_proj"]))
        FreezeLayers(**freeze).prepare_model(higher, Task())


METHODS = {
    "freeze": lambda folder: FreezeLayers(bottom=1),
    "replay": lambda folder: Replay(toy.rows(seed=3), ratio=0.3),
    "gere": lambda folder: GeRe(toy.rows(seed=3), per_batch=1, cache_dir=str(folder)),
    "recadam": lambda folder: RecAdam(anneal="none", pull=0.01),
    "kif": lambda folder: KIF(toy.rows(seed=3)),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_loaded_for_inference_is_refused(name, tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    get_peft_model(toy.model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")

    def load(**how):
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter", **how
        )

    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer_of(tmp_path, load(), METHODS[name](tmp_path))
    trainer_of(tmp_path, load(is_trainable=True), METHODS[name](tmp_path))


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Call model\.requires_grad_\(True\)"):
        trainer_of(tmp_path, toy.model().requires_grad_(False), FreezeLayers(bottom=1))


# ------------------------------------------------------------------------------------------ a run that ends early


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [n for n, m in model.named_modules() for kind in kinds if getattr(m, kind)]


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Broken, torch.OutOfMemoryError], ids=lambda e: e.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_leaves_no_hooks(name, error, tmp_path):
    model = toy.model()
    trainer = trainer_of(tmp_path / "1", model, METHODS[name](tmp_path))
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) > 2:
            raise error

    ours = model.model.layers[3].register_forward_hook(fail)
    with pytest.raises(error):
        trainer.train()
    ours.remove()
    assert not hooks(model)
    model.requires_grad_(True)
    before = model.model.embed_tokens.weight.detach().clone()
    SFTTrainer(
        model, SFTConfig(**toy.settings(tmp_path / "2")), train_dataset=toy.rows(), processing_class=toy.tokenizer()
    ).train()
    assert not torch.equal(before, model.model.embed_tokens.weight)


def test_two_trainers_one_after_another_on_a_model(tmp_path):
    """The second sees its own forward passes, and the first leaves nothing."""
    model = toy.model()
    for i in (1, 2):
        trainer = ContinualTrainer(
            model, ContinualConfig(**toy.settings(tmp_path / str(i)), fresh_methods=True), train_dataset=toy.rows(),
            processing_class=toy.tokenizer(),
            methods=[GeRe(toy.rows(seed=3), per_batch=1, cache_dir=str(tmp_path / f"c{i}")), FreezeLayers(bottom=1)],
        )  # fmt: skip
        trainer.train()
        assert not hooks(model)
        logged = [e["gere/violations"] for e in trainer.state.log_history if "gere/violations" in e]
        assert logged[0] == 0


def test_retries_with_smaller_batches_hook_once(tmp_path):
    model = toy.model()
    method = FreezeLayers(bottom=1)
    method.prepare_model(model, Task())
    for _ in range(2):
        method.begin_task(FakeRun(model))
        assert len(model.model.embed_tokens._forward_hooks) == 1
    method.release()
    assert not hooks(model) and len(find_blocks(model)) == 4
