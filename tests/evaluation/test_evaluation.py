"""Teacher forcing against generation and against the model's own loss."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hf_continual import ContinualTrainer
from hf_continual.evaluation.exact_match import generated, teacher_forced
from hf_continual.evaluation.general import general_loss
from hf_continual.evaluation.result import mean_of, proportion
from tests import toy


@pytest.fixture(scope="module")
def half_taught(tmp_path_factory):
    """A tiny model that knows some of the answers."""
    from trl import SFTConfig

    rows = toy.rows("prompt_completion", number=16)
    settings = toy.settings(tmp_path_factory.mktemp("taught"), max_steps=70, learning_rate=1e-2)
    trainer = ContinualTrainer(
        toy.model(), SFTConfig(**settings), train_dataset=rows.select(range(9)), processing_class=toy.tokenizer()
    )
    trainer.train()
    return trainer.model, rows


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_teacher_forcing_is_generation(half_taught, batch_size):
    model, rows = half_taught
    forced = teacher_forced(model, toy.tokenizer(), rows, batch_size)
    greedy = generated(model, toy.tokenizer(), rows, batch_size)
    assert forced.right == greedy.right
    assert 0 < sum(forced.right) < len(rows) and forced.exact.value == sum(forced.right) / 16
    wanted = [p == c.strip() for p, c in zip(greedy.predictions, rows["completion"], strict=True)]
    assert wanted == greedy.right


def test_answer_loss_is_the_models_loss(half_taught):
    model, rows = half_taught
    tokenizer = toy.tokenizer()
    losses = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], 1]
        ids = torch.tensor([[*prompt, *answer]])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
    got = teacher_forced(model, tokenizer, rows).nll
    assert got.value == pytest.approx(sum(losses) / 16, rel=1e-4)
    deviation = torch.tensor(losses).std().item() / math.sqrt(16)
    assert got.standard_error == pytest.approx(deviation, rel=1e-3)


def test_general_loss_is_the_models_loss():
    model, texts = toy.model(), toy.rows(number=5)["text"][:]
    ids = [torch.tensor([toy.tokenizer()(t)["input_ids"]]) for t in texts]
    with torch.no_grad():
        sums = [float(model(input_ids=i, labels=i).loss) * (i.shape[1] - 1) for i in ids]
    count = sum(i.shape[1] - 1 for i in ids)
    for size in (1, 3):
        got = general_loss(model, toy.tokenizer(), texts, batch_size=size)
        assert got.value == pytest.approx(sum(sums) / count, rel=1e-5) and got.n == count


def test_adapters_are_evaluated_and_the_mode_is_restored():
    model = get_peft_model(toy.model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.train()
    rows = toy.rows("prompt_completion", number=4)
    with_adapter = teacher_forced(model, toy.tokenizer(), rows).nll.value
    with model.disable_adapter():
        without = teacher_forced(model, toy.tokenizer(), rows).nll.value
    assert with_adapter != without and model.training


def test_scores_say_what_they_rest_on():
    half = proportion(5, 10, "x")
    assert (half.value, half.n, half.status) == (0.5, 10, "MEASURED")
    assert half.standard_error == pytest.approx(math.sqrt(0.25 / 10))
    assert proportion(0, 0, "x").status == mean_of([], "x").status == "NOT_RUN"
    empty = teacher_forced(toy.model(), toy.tokenizer(), Dataset.from_list([]))
    assert empty.exact.value is None and empty.exact.status == "NOT_RUN"
