"""A method's view: hooks in order, one forward pass with its graph, the run."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from trl import SFTConfig

from hf_continual import ContinualTrainer, FreezeLayers, Method, Paper, RecAdam, Replay, merge_linear
from hf_continual.hub.folder_facts import read_facts
from hf_continual.methods.base import Run
from tests import toy


class Everything(Method):
    """Notes each call, and adds a term on the last hidden state and on one block."""

    name = "everything"
    paper = Paper("x", "y", 2020)
    taps = ("last_hidden_state", "model.layers.1")

    def __init__(self):
        self.calls, self.forwards, self.state = [], [], None

    def prepare_model(self, model, task):
        self.calls.append(f"prepare_model {task.index}")

    def begin_task(self, run):
        self.calls.append("begin_task")
        assert run.max_steps == 2 and run.step == 0 and run.tokenizer.eos_token == "<eos>"

    def loss_terms(self, forward):
        self.calls.append("loss_terms")
        self.forwards.append(forward)
        hidden_BSD = forward.taps["last_hidden_state"]
        assert hidden_BSD.requires_grad and forward.taps["model.layers.1"].shape == hidden_BSD.shape
        return {"norm": 0.01 * hidden_BSD.square().mean()}

    def edit_gradients(self, params):
        self.calls.append("edit_gradients")
        for p in params.values():
            p.grad.mul_(0.5)

    def after_step(self, run):
        self.calls.append("after_step")
        assert any(p.grad is not None for p in run.model.parameters())

    def end_step(self, run):
        self.calls.append("end_step")
        assert all(p.grad is None or not p.grad.any() for p in run.model.parameters())

    def end_task(self, run):
        self.calls.append("end_task")


def build(folder, *methods, peft=None, **settings):
    return ContinualTrainer(
        toy.model(),
        SFTConfig(**toy.settings(folder, max_steps=2, **settings)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        peft_config=peft,
        methods=methods,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_hooks_in_order(tmp_path, checkpointing, peft):
    method = Everything()
    lora = LoraConfig(r=2, target_modules=["q_proj"]) if peft else None
    trainer = build(tmp_path, method, peft=lora, gradient_accumulation_steps=2, activation_checkpointing=checkpointing)
    trainer.train()
    step = ["loss_terms", "loss_terms", "edit_gradients", "after_step", "end_step"]
    assert method.calls == ["prepare_model 0", "begin_task", *step, *step, "end_task"]
    assert all("everything/norm" in entry for entry in trainer.state.log_history[:2])


def test_terms_do_not_depend_on_accumulation(tmp_path):
    """A mean over the batch, and a token mean, add up to the same over micro-batches of equal rows."""

    class Term(Method):
        name, paper = "term", Paper("x", "y", 2020)

        def loss_terms(self, forward):
            return {"tokens": forward.token_mean(forward.token_loss_BS * forward.label_mask())}

    trained = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = build(tmp_path, Term(), **settings)
        trainer.train()
        trained.append(toy.flat(trainer.model))
        if accumulation == 1:  # the term equals the loss, so the total is twice the task's
            logged = trainer.state.log_history[0]
            assert logged["loss"] == pytest.approx(2 * logged["term/tokens"], rel=1e-4)
    for other in trained[1:]:
        torch.testing.assert_close(trained[0], other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 32}], ids=["padded", "packed"])
def test_every_token_knows_where_it_is_from(tmp_path, layout):
    method = Everything()
    rows = toy.rows(seed=9, low=30, high=59)
    trainer = build(tmp_path, method, Replay(rows, per_batch=2), **layout)
    trainer.train()
    for forward in method.forwards:
        mine = forward.mask("replay")
        ids, row, offset = forward.inputs["input_ids"][mine], forward.row_BS[mine], forward.offset_BS[mine]
        prepared = trainer.run.rows(trainer.methods.methods[1])
        wanted = [prepared[int(r)]["input_ids"][int(o)] for r, o in zip(row, offset, strict=True)]
        assert ids.tolist() == wanted and mine.any()
        assert not (forward.mask() & mine).any()
        assert (forward.inputs["input_ids"][forward.mask()] < 34).all()  # the task's words, <eos> and <pad> as eos


def test_the_run_trains_by_hand(tmp_path):
    """Parts of an inner and outer loop: batches, loss, backward and a step of the trainer's optimizer."""

    class Outer(Method):
        name, paper, losses = "outer", Paper("x", "y", 2020), []

        def end_step(self, run: Run):
            rows = run.prepare(toy.rows(seed=20, number=4))
            batches = list(run.batches(rows, 2))
            assert len(batches) == 2
            before = toy.flat(run.model)
            loss = run.loss(batches[0])
            run.backward(loss)
            run.optimizer_step()
            assert not torch.equal(before, toy.flat(run.model))
            self.losses.append(run.mean(loss.detach()))

    method = Outer()
    trainer = build(tmp_path, method, lr_scheduler_type="constant")
    trainer.train()
    assert len(method.losses) == 2 and trainer.state.global_step == 2
    with pytest.raises(KeyError, match="adds no replay rows"):
        trainer.run.rows(method)


def test_without_training_nothing_is_tapped(tmp_path):
    method = Everything()
    trainer = build(tmp_path, method)
    trainer.evaluate(toy.rows(seed=5, number=4))
    assert not method.forwards and trainer.tap.seen == {} and trainer.tap.outputs is None
    trainer.tap.remove()
    assert not any(m._forward_hooks for m in trainer.model.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_all_three_on_a_quantised_base(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    toy.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
        dtype=torch.bfloat16,
    )
    trainer = ContinualTrainer(
        quantised,
        SFTConfig(**toy.settings(tmp_path / "out", save_strategy="steps", save_steps=2)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        methods=[Replay(toy.rows(seed=9), ratio=0.3), FreezeLayers(bottom=1), RecAdam(anneal="none", pull=0.05)],
    )
    before = toy.flat(trainer.model)
    trainer.train()
    assert not torch.equal(before, toy.flat(trainer.model))
    states = trainer.run.optimizer.state.values()
    assert all(s["exp_avg"].dtype == torch.float32 and s["anchor"].dtype == torch.bfloat16 for s in states)
    assert (tmp_path / "out" / "checkpoint-4" / "continual" / "run.json").is_file()
    trainer.save_model()
    noted = read_facts(tmp_path / "out").adapter["quantization"]
    wanted = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    # The quantised weights were bfloat16, whatever TRL did to the others for training.
    assert noted == wanted | {"dtype": "bfloat16"}
    assert "quantised during training: quant_method=bitsandbytes" in (tmp_path / "out" / "README.md").read_text()
    # The folder has enough to put the adapter onto the base it saw.
    errors = {}
    for how in ("dequantize", "original"):
        merge_linear(
            [tmp_path / "out"],
            tmp_path / how,
            base=tmp_path / "base",
            output="model",
            quantized_base=how,
            progress=False,
        )
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / how, dtype=torch.float32).eval()
        ids = torch.arange(4, 24).reshape(2, 10)
        with torch.no_grad():
            errors[how] = float((merged(ids).logits - trainer.model.eval()(input_ids=ids).logits.float()).abs().max())
    assert errors["dequantize"] < 0.2 * errors["original"], errors


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_low_precision_weights_resume_bit_for_bit(tmp_path, dtype):
    def make():
        return ContinualTrainer(
            toy.model().to(dtype),
            SFTConfig(**toy.settings(tmp_path, save_strategy="steps", save_steps=2)),
            train_dataset=toy.rows(),
            processing_class=toy.tokenizer(),
            methods=[RecAdam(anneal="none", pull=0.05), Replay(toy.rows(seed=9), ratio=0.3)],
        )

    straight, resumed = make(), make()
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
