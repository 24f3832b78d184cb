"""Public behaviours of SFTTrainer, side by side with ContinualTrainer, without and with methods."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_continual import ContinualConfig, ContinualTrainer, FreezeLayers, Replay
from tests import toy

pytestmark = pytest.mark.filterwarnings(
    # Both trainers pass on these deprecated arguments, and TRL warns about them.
    "ignore:`return_outputs=True`:FutureWarning",
    "ignore:`label_smoothing_factor` is deprecated:FutureWarning",
    "ignore:`compute_loss_func` is deprecated:FutureWarning",
    "ignore:The `'keep_end'` truncation mode:FutureWarning",
)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}


def summed_loss(outputs, labels, num_items_in_batch=None):
    shifted = labels[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), shifted, reduction="sum")
    return losses / num_items_in_batch


class Count(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_step_begin(self, *args, **kwargs):
        self.events.append("begin")

    def on_step_end(self, *args, **kwargs):
        self.events.append("end")

    def on_evaluate(self, *args, **kwargs):
        self.events.append("evaluate")


def build(trainer_class, folder, *, data=None, kind="text", methods=None, settings=None, **arguments):
    extra = {} if methods is None else {"methods": methods}
    return trainer_class(
        toy.model(),
        SFTConfig(**toy.settings(folder, **(settings or {}))),
        train_dataset=toy.rows(kind) if data is None else data,
        processing_class=toy.tokenizer(),
        **arguments,
        **extra,
    )


def stream(rows):
    return rows.to_iterable_dataset()


CASES = {
    "eval dict": dict(eval_dataset={"a": toy.rows(seed=5, number=6), "b": toy.rows(seed=6, number=6)}, settings={"eval_strategy": "steps", "eval_steps": 2}),
    "compute_metrics": dict(eval_dataset=toy.rows(seed=5, number=8), compute_metrics=accuracy, settings={"eval_strategy": "steps", "eval_steps": 2}),
    "streaming": dict(data=stream(toy.rows())),
    "dft": dict(settings={"loss_type": "dft"}),
    "label smoothing": dict(settings={"label_smoothing_factor": 0.1}),
    "compute_loss_func": dict(compute_loss_func=summed_loss),
    "formatting": dict(data=toy.rows().rename_column("text", "body"), formatting_func=lambda row: row["body"]),
    "tokenized": dict(data=toy.rows("tokenized")),
    "sgd": dict(optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})),
    "neftune": dict(settings={"neftune_noise_alpha": 5.0}),
    "epochs": dict(settings={"max_steps": -1, "num_train_epochs": 1.0, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}),
    "keep_end": dict(settings={"max_length": 5, "truncation_mode": "keep_end"}),
    "workers": dict(settings={"dataloader_num_workers": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_side_by_side(tmp_path, case):
    plain = build(SFTTrainer, tmp_path / "sft", **CASES[case])
    results = [plain.train()]
    ours = build(ContinualTrainer, tmp_path / "continual", methods=[], **CASES[case])
    results.append(ours.train())
    assert results[0].training_loss == results[1].training_loss
    assert torch.equal(toy.flat(plain.model), toy.flat(ours.model))
    assert toy.logs(plain) == toy.logs(ours)


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("label smoothing", "compute_loss_func")])
def test_with_methods(tmp_path, case):
    """Every behaviour also runs with methods on, and evaluation never sees their rows or terms."""
    data = CASES[case].get("data")
    kind = "tokenized" if case == "tokenized" else "text"
    rows = toy.rows(kind, seed=9, low=30, high=59)
    if case == "formatting":
        rows = rows.rename_column("text", "body")
    trainer = build(
        ContinualTrainer,
        tmp_path,
        methods=[Replay(rows, ratio=0.3), *([] if data else [FreezeLayers(1)])],
        **CASES[case],
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "replay/loss" in entry]
    assert logged and all(0 < entry["replay/share"] < 0.7 for entry in logged)
    evaluated = [entry for entry in trainer.state.log_history if any(k.startswith("eval") for k in entry)]
    assert not [key for entry in evaluated for key in entry if "replay" in key]


def test_evaluation_is_the_same_with_methods(tmp_path):
    held = toy.rows(seed=5, number=8)
    plain = build(SFTTrainer, tmp_path / "sft", eval_dataset=held)
    ours = build(
        ContinualTrainer, tmp_path / "continual", eval_dataset=held, methods=[Replay(toy.rows(seed=9), per_batch=2)]
    )
    wanted, got = (t.evaluate() for t in (plain, ours))
    keys = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    assert [wanted[k] for k in keys] == [got[k] for k in keys]
    by_dict = ours.evaluate({"x": held})
    assert by_dict["eval_x_loss"] == wanted["eval_loss"]


def test_predict_equals(tmp_path):
    plain, ours = (build(c, tmp_path / c.__name__) for c in (SFTTrainer, ContinualTrainer))
    prepared = plain._prepare_dataset(
        toy.rows(seed=5, number=4), plain.processing_class, plain.args, False, None, "test"
    )
    prepared = prepared.select_columns(["input_ids", "labels"])
    one, two = (t.predict(prepared) for t in (plain, ours))
    assert np.array_equal(one.predictions, two.predictions)


def test_callbacks_are_called(tmp_path):
    counts = [Count(), Count()]
    build(SFTTrainer, tmp_path / "sft", callbacks=[counts[0]]).train()
    build(ContinualTrainer, tmp_path / "c", callbacks=[counts[1]], methods=[FreezeLayers(1)]).train()
    assert counts[0].events == counts[1].events and counts[0].events


def test_resume_equals(tmp_path):
    trainers = []
    for cls in (SFTTrainer, ContinualTrainer):
        folder = tmp_path / cls.__name__
        build(cls, folder, settings={"save_strategy": "steps", "save_steps": 2, "max_steps": 4}).train()
        again = build(cls, folder, settings={"save_strategy": "steps", "save_steps": 2, "max_steps": 6})
        again.train(resume_from_checkpoint=True)
        trainers.append(again)
    assert torch.equal(toy.flat(trainers[0].model), toy.flat(trainers[1].model))
    assert toy.logs(trainers[0]) == toy.logs(trainers[1])


def test_plain_training_arguments_are_accepted(tmp_path):
    arguments = {k: v for k, v in toy.settings(tmp_path).items()}
    trainer = ContinualTrainer(
        toy.model(),
        TrainingArguments(**arguments),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        methods=[FreezeLayers(1)],
    )
    assert isinstance(trainer.args, SFTConfig)
    trainer.train()


def test_saved_models_load_plainly(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = build(ContinualTrainer, tmp_path, methods=[FreezeLayers(1), Replay(toy.rows(seed=3), ratio=0.2)])
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert torch.equal(toy.flat(AutoModelForCausalLM.from_pretrained(tmp_path / "final")), toy.flat(trainer.model))


def test_the_signature_is_sfttrainers():
    wanted = list(inspect.signature(SFTTrainer.__init__).parameters.values())
    got = list(inspect.signature(ContinualTrainer.__init__).parameters.values())
    assert [p.name for p in got[:-1]] == [p.name for p in wanted]
    assert [p.default for p in got[:-1]] == [p.default for p in wanted]
    assert got[-1].name == "methods" and got[-1].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_command_line_reads_methods():
    from transformers import HfArgumentParser

    arguments = ["--output_dir", "x", "--use_cpu", "True", "--methods"]
    (config,) = HfArgumentParser(ContinualConfig).parse_args_into_dataclasses([*arguments, '{"freeze": {"bottom": 2}}'])
    assert config.methods == {"freeze": {"bottom": 2}}
    (config,) = HfArgumentParser(ContinualConfig).parse_args_into_dataclasses([*arguments, '["recadam"]'])
    assert config.methods == ["recadam"]
    (config,) = HfArgumentParser(ContinualConfig).parse_args_into_dataclasses([*arguments, "recadam"])
    assert config.methods == "recadam"
