"""Replay in the trainer: the ratio of tokens, the weight, the log, and refusals."""

from __future__ import annotations

import logging

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from hf_continual import ContinualTrainer, Replay
from hf_continual.data.collator import ORIGIN
from tests import toy


def example(world=None):
    return Replay(toy.rows(seed=9, low=30, high=59), ratio=0.3)


def zero(world=None):
    return Replay(toy.rows(seed=9, low=30, high=59), ratio=0.3, weight=0.0)


ZERO_TOLERANCE = 1e-6  # the task's rows are computed in a batch with others


LAYOUTS = {
    "padded": {},
    "packed-bfd": {"packing": True, "max_length": 32},
    "packed-wrapped": {"packing": True, "max_length": 32, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "multiple": {"pad_to_multiple_of": 8},
}


def build(folder, *methods, data=None, kind="text", **settings):
    return ContinualTrainer(
        toy.model(),
        SFTConfig(**toy.settings(folder, **settings)),
        train_dataset=toy.rows(kind) if data is None else data,
        processing_class=toy.tokenizer(),
        methods=methods,
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ratio_is_the_share_of_tokens(tmp_path, layout, streaming):
    data = toy.rows(number=60).to_iterable_dataset() if streaming else toy.rows(number=60)
    trainer = build(tmp_path, example(), data=data, max_steps=12, **LAYOUTS[layout])
    counted = {"task": 0, "replay": 0}
    compute = trainer.compute_loss

    def count(model, inputs, *args, **kwargs):
        source = inputs[ORIGIN]["source"]
        counted["task"] += int((source == -1).sum())
        counted["replay"] += int((source == 0).sum())
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = count
    trainer.train()
    share = counted["replay"] / sum(counted.values())
    assert share == pytest.approx(0.3, abs=0.03)
    task, replayed, _ = trainer.replay_totals().sum(axis=(0, 1))
    assert (task, replayed) == (counted["task"], counted["replay"])
    logged = [entry["replay/share"] for entry in trainer.state.log_history if "replay/share" in entry]
    assert len(logged) == 12 and sum(logged) / 12 == pytest.approx(0.3, abs=0.03)


def test_two_sources_and_their_losses(tmp_path):
    other = Replay(toy.rows(seed=12, low=10, high=20), per_batch=1, name="general")
    trainer = build(tmp_path, example(), other, max_steps=10)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert {"task/loss", "replay/loss", "general/loss", "replay/share", "general/share"} <= entry.keys()
    totals = trainer.replay_totals().sum(axis=1)
    assert totals[0, 1] / (totals[:, 1].sum() + totals[0, 0]) == pytest.approx(0.3, abs=0.03)
    assert totals[1, 2] == 10


def test_the_loss_is_the_weighted_token_mean(tmp_path):
    """One step by hand: sums over tokens of task and replay, divided by the weighted count."""
    for weight in (0.25, 1.0, 3.0):
        method = Replay(toy.rows(seed=9, low=30, high=59), per_batch=2, weight=weight)
        trainer = build(tmp_path, method, max_steps=1, gradient_accumulation_steps=2)
        sums = {-1: [0.0, 0], 0: [0.0, 0]}
        compute = trainer.compute_loss

        def spy(model, inputs, *args, trainer=trainer, compute=compute, sums=sums, **kwargs):
            source = inputs[ORIGIN]["source"][:, 1:]
            plain = {k: v for k, v in inputs.items() if k != ORIGIN}
            with torch.no_grad():
                nll = -trainer.model(**plain, fused_lm_head=True).log_probs
            for k, total in sums.items():
                of_source = (source == k) & (inputs["labels"][:, 1:] != -100)
                total[0] += float(nll[of_source].sum())
                total[1] += int(of_source.sum())
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = spy
        trainer.train()
        (task, n_task), (replay, n_replay) = sums.values()
        wanted = (task + weight * replay) / (n_task + weight * n_replay)
        entry = trainer.state.log_history[0]
        assert entry["loss"] == pytest.approx(wanted, rel=1e-5)
        assert entry["task/loss"] == pytest.approx(task / n_task, rel=1e-5)
        assert entry["replay/loss"] == pytest.approx(replay / n_replay, rel=1e-5)


def test_merged_rows_train_like_rows_of_the_task(tmp_path):
    """With weight 1, a batch of two task rows and two replay rows is a batch of four."""
    task, old = toy.rows(number=2), toy.rows(seed=9, number=2, low=30, high=59)
    mixed = build(tmp_path, Replay(old, per_batch=2), data=task, max_steps=3, per_device_train_batch_size=2)
    mixed.train()
    from datasets import concatenate_datasets

    plain = SFTTrainer(
        toy.model(),
        SFTConfig(**toy.settings(tmp_path, max_steps=3)),
        train_dataset=concatenate_datasets([task, old]),
        processing_class=toy.tokenizer(),
    )
    plain.train()
    torch.testing.assert_close(toy.flat(mixed.model), toy.flat(plain.model), rtol=0, atol=2e-6)


def test_a_missed_share_is_logged_with_numbers(tmp_path, caplog):
    long = Replay([{"text": " ".join(["w5"] * 100)}], ratio=0.05)
    with caplog.at_level(logging.WARNING):
        build(tmp_path, long, max_steps=1).train()
    assert "ratio=0.05 was requested and 0.0000 achieved (0 of" in caplog.text


def test_prompt_and_completion_train_on_the_completion_only(tmp_path):
    method = Replay(toy.rows("prompt_completion", seed=9), ratio=0.3, row_type="prompt_completion")
    trainer = build(tmp_path, method, kind="text")
    labels = trainer.mixer.rows[0]["labels"]
    assert all(row[0] == -100 and row[-1] != -100 for row in labels)
    trainer.train()
    text = Replay(toy.rows("text", seed=9), ratio=0.3, row_type="text")
    trainer = build(tmp_path, text, kind="prompt_completion")
    assert all(-100 not in row for row in trainer.mixer.rows[0]["labels"])
    trainer.train()
    build(tmp_path, Replay(toy.rows("messages", seed=9), ratio=0.3), kind="messages", assistant_only_loss=True).train()
    build(tmp_path, Replay(toy.rows("tokenized", seed=9), ratio=0.3), kind="text").train()


def test_rows_of_another_type_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the replay rows are prompt_completion and the task's rows are text"):
        build(tmp_path, Replay(toy.rows("prompt_completion"), ratio=0.3))
    with pytest.raises(ValueError, match="row_type='messages' was given, but the rows are text"):
        build(tmp_path, Replay(toy.rows(), ratio=0.3, row_type="messages"))
    with pytest.raises(ValueError, match=r"columns \['question'\] and the task's rows are text"):
        build(tmp_path, Replay([{"question": "x"}], ratio=0.3))


def test_rows_of_another_tokenizer_are_refused(tmp_path):
    rows = [{"input_ids": [3, 900], "labels": [3, 900]}]
    with pytest.raises(ValueError, match="token id 900, but the model embeds ids 0 to 63"):
        build(tmp_path, Replay(rows, ratio=0.3))
    with pytest.raises(ValueError, match=r"tokenizer knows \d+ tokens and the model embeds 40"):
        ContinualTrainer(
            toy.model(vocab_size=40),
            SFTConfig(**toy.settings(tmp_path)),
            train_dataset=toy.rows(),
            processing_class=toy.tokenizer(),
            methods=[example()],
        )


def test_rows_without_a_trainable_token_are_refused(tmp_path):
    rows = [{"prompt": " ".join(["w1"] * 20), "completion": " w2"}]
    with pytest.raises(ValueError, match="none of the 1 rows has a trainable token left within max_length=8"):
        build(tmp_path, Replay(rows, ratio=0.3), kind="prompt_completion", max_length=8)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, ValueError, "either ratio"),
        ({"ratio": 0.1, "per_batch": 1}, ValueError, "either ratio"),
        ({"ratio": 0.0}, ValueError, "between 0 and 1, both excluded"),
        ({"ratio": 1.2}, ValueError, "between 0 and 1, both excluded"),
        ({"ratio": "0.1"}, TypeError, "must be a number"),
        ({"per_batch": 0}, ValueError, r"at least 1 \(rows per micro-batch\)"),
        ({"per_batch": 1.5}, TypeError, r"must be a whole number \(rows per micro-batch\), got float"),
        ({"ratio": 0.1, "weight": -1}, ValueError, "at least 0"),
        ({"ratio": 0.1, "name": "a/b"}, ValueError, "without '/'"),
    ],
)
def test_sentences(options, error, said):
    with pytest.raises(error, match=said):
        Replay([{"text": "a"}], **options)


def test_ratios_must_leave_room_for_the_task(tmp_path):
    with pytest.raises(ValueError, match="add up to 1.2"):
        build(tmp_path, Replay(toy.rows(), ratio=0.6), Replay(toy.rows(), ratio=0.6, name="b"))


def test_a_streamed_task_resumes_bit_for_bit(tmp_path):
    def make():
        data = toy.rows(number=60).to_iterable_dataset()
        return build(tmp_path, example(), data=data, max_steps=6, save_strategy="steps", save_steps=3)

    straight, resumed = make(), make()
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
    assert (straight.replay_totals() == resumed.replay_totals()).all()
