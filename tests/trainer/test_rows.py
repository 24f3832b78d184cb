"""Rows that methods add: prepared with the trainer's settings, in their own order, joined by any capable collator."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, GPT2Config, GPT2LMHeadModel
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_continual import KIF, ContinualTrainer, Replay
from hf_continual.data.collator import ORIGIN
from tests import toy

pytestmark = pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")


def build(folder, *methods, data=None, kind="text", model=None, settings=None, **arguments):
    return ContinualTrainer(
        **{
            "model": model or toy.model(),
            "args": SFTConfig(**toy.settings(folder, **(settings or {}))),
            "train_dataset": toy.rows(kind) if data is None else data,
            "processing_class": toy.tokenizer(),
            "methods": methods,
            **arguments,
        }
    )


def old(**changes):
    return Replay(toy.rows(seed=9, low=30, high=59), **{"per_batch": 2, **changes})


def spied(trainer):
    """The merged batches that a trainer trains on."""
    seen, compute = [], trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.append({**inputs, ORIGIN: dict(inputs[ORIGIN])})
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    return seen


def test_rows_keep_their_order_when_the_task_is_shuffled(tmp_path):
    plain, shuffled = (build(tmp_path, old(), settings={"shuffle_dataset": s}) for s in (False, True))
    assert plain.mixer.rows[0]["input_ids"] == shuffled.mixer.rows[0]["input_ids"]
    assert plain.train_dataset["input_ids"] != shuffled.train_dataset["input_ids"], "the task's are shuffled"
    assert shuffled.args.shuffle_dataset is True


MASKED = {"input_ids": [5, 6, 7, 8, 9, 1]}


@pytest.mark.parametrize(
    ("columns", "asked", "wanted"),
    [
        ({"completion_mask": [0, 0, 0, 0, 1, 1]}, None, [-100] * 4 + [9, 1]),
        ({"completion_mask": [0, 0, 0, 0, 1, 1]}, False, [5, 6, 7, 8, 9, 1]),
        ({"assistant_masks": [0, 1, 1, 0, 1, 1]}, None, [-100, 6, 7, -100, 9, 1]),
        ({"completion_mask": [0, 0, 0, 1, 1, 1], "assistant_masks": [0, 1, 1, 0, 1, 1]}, None, [-100] * 4 + [9, 1]),
        ({"completion_mask": [0] * 5 + [1], "labels": [-100, 6, 7, 8, 9, 1]}, None, [-100, 6, 7, 8, 9, 1]),
    ],
)
@pytest.mark.parametrize("row_type", ["same", "tokenized"])
def test_masks_say_what_is_trained(tmp_path, columns, asked, wanted, row_type):
    rows = [{**MASKED, **columns}] * 4
    settings = {"completion_only_loss": asked}
    trainer = build(tmp_path, Replay(rows, per_batch=1, row_type=row_type), settings=settings)
    assert trainer.mixer.rows[0]["labels"][:] == [wanted] * 4
    assert trainer.completion_only_loss is bool(asked), "the task's own way is as before"


def test_masks_of_kif_and_of_a_tokenised_task(tmp_path, caplog):
    rows = Dataset.from_list([{**MASKED, "completion_mask": [0, 0, 0, 0, 1, 1]}] * 4)
    method = KIF(rows, row_type="tokenized")
    with caplog.at_level(logging.WARNING):
        build(tmp_path, method, data=rows)
    assert method._memory["labels"][0] == [-100] * 4 + [9, 1]
    assert "SFTTrainer ignores the completion_mask of the task's rows" in caplog.text


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "w1 w2"}, {"text": None}], "row 2: 'text': it must be text, but is "),
        (Dataset.from_list([{"text": 5}]), "'text': it must be text, but is a number, 5"),
        ([{"prompt": "w1", "completion": None}], "'completion': it must be text or a list of messages"),
        ([{**MASKED, "labels": [5, 6]}], "row 0 has 6 tokens in 'input_ids' and 2 in 'labels'"),
        ([MASKED | {"completion_mask": [0, 1]}], "row 0 has 6 tokens in 'input_ids' and 2 in 'completion_mask'"),
        ([MASKED, {"input_ids": []}], "1 of 2 tokenised rows hold no tokens; the first is row 1"),
    ],
)
def test_rows_that_hold_something_else(tmp_path, rows, said):
    kind = "prompt_completion" if "prompt" in rows[0] else "text"
    with pytest.raises(ValueError, match=said):
        build(tmp_path, Replay(rows, per_batch=1), kind=kind)


def test_another_text_column_is_checked_too(tmp_path):
    rows = Dataset.from_list([{"body": "w1 w2"}, {"body": None}])
    task = toy.rows().rename_column("text", "body")
    with pytest.raises(ValueError, match="row 2: 'text': it must be text"):
        build(tmp_path, Replay(rows, per_batch=1), data=task, settings={"dataset_text_field": "body"})


def test_formats_and_transforms(tmp_path):
    rows = toy.rows("tokenized", seed=4)
    plain, formatted = (build(tmp_path, Replay(r, per_batch=1)) for r in (rows, rows.with_format("torch")))
    assert plain.mixer.rows[0][:] == formatted.mixer.rows[0][:]
    changed = toy.rows().with_transform(lambda batch: {"text": [text + " w5" for text in batch["text"]]})
    with pytest.raises(ValueError, match="cannot prepare a dataset that uses `Dataset.with_transform"):
        build(tmp_path, Replay(changed, per_batch=1))


def test_several_splits_are_named(tmp_path):
    both = DatasetDict(train=toy.rows(), held=toy.rows(seed=2))
    with pytest.raises(TypeError, match=r"a DatasetDict with the splits train, held: .* data\['train'\]"):
        Replay(both, ratio=0.1)
    for methods in ((), (old(),)):
        with pytest.raises(TypeError, match="train_dataset is a DatasetDict with the splits train, held"):
            build(tmp_path, *methods, data=both)


def test_dropped_rows_are_counted(tmp_path, caplog):
    rows = [{"prompt": "w1 " * 20, "completion": " w2"}, {"prompt": "w1", "completion": " w2"}]
    with caplog.at_level(logging.WARNING):
        trainer = build(tmp_path, Replay(rows, per_batch=1), kind="prompt_completion", settings={"max_length": 12})
    assert len(trainer.mixer.rows[0]) == 1 and "1 of 2 rows have no trainable token left" in caplog.text


def test_a_tokenizer_with_spare_tokens(tmp_path):
    tokenizer = toy.tokenizer()
    tokenizer.add_tokens(["<image>"])
    assert len(tokenizer) > toy.model().get_input_embeddings().weight.shape[0]
    for method in (old(), KIF(toy.rows(seed=3), inner_steps=1, outer_steps=1)):
        build(tmp_path, method, processing_class=tokenizer, settings={"max_steps": 2}).train()
    with pytest.raises(
        ValueError, match=r"token id 64, .* 0 to 63. The tokenizer knows 65 tokens and the model embeds 64"
    ):
        build(tmp_path, Replay([{"text": "w1 <image> w2"}], per_batch=1), processing_class=tokenizer)


def test_rows_longer_than_the_models_table_of_positions(tmp_path):
    def make(**settings):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=12))
        return build(tmp_path, Replay([{"text": "w1 " * 20}], per_batch=1), model=model, settings=settings)

    with pytest.raises(ValueError, match="a row has 21 tokens but the model has positions for 12. Set max_length=12"):
        make()
    make(max_length=12, max_steps=1).train()


COLLATORS = {
    "flattening": lambda: DataCollatorWithFlattening(),
    "flattening, flash": lambda: DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    "padding-free": lambda: DataCollatorForLanguageModeling(0, padding_free=True),
    "left padded": lambda: DataCollatorForSeq2Seq(left_padding()),
    "multiples": lambda: DataCollatorForLanguageModeling(0, pad_to_multiple_of=8),
}


def left_padding():
    tokenizer = toy.tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.mark.parametrize("collator", COLLATORS)
def test_collators_of_ones_own(tmp_path, collator):
    """Every replayed token is where the maps say, and the loss is the mean over all tokens."""
    trainer = build(tmp_path, old(), data_collator=COLLATORS[collator](), settings={"max_steps": 2})
    for batch in spied(trainer):
        origin, rows = batch[ORIGIN], trainer.mixer.rows[0]["input_ids"]
        source, row, offset = (origin[k] for k in ("source", "row", "offset"))
        assert source.shape == batch["input_ids"].shape
        where = torch.nonzero(source == 0)
        assert len(where) == sum(length for *_, length in origin["drawn"])
        for r, c in where.tolist():
            assert rows[int(row[r, c])][int(offset[r, c])] == int(batch["input_ids"][r, c])
        if "cu_seq_lens_q" in batch:
            starts = batch["cu_seq_lens_q"].tolist()
            assert starts[-1] == source.shape[1] and starts == sorted(set(starts))
            assert int(batch["seq_idx"].max()) == len(starts) - 2
    counted = trainer.replay_totals().sum(axis=(0, 1))
    assert counted[2] == 4 and counted[0] > counted[1] > 0
    entry = trainer.state.log_history[0]
    assert {"task/loss", "replay/loss"} <= entry.keys()
    if collator == "left padded":
        return  # a padding token predicts the first of a shorter row there, with SFTTrainer too
    padded = build(tmp_path, old(), settings={"max_steps": 2})
    padded.train()
    assert entry["loss"] == pytest.approx(padded.state.log_history[0]["loss"], rel=1e-4)


def tokenising(rows):
    return DataCollatorForLanguageModeling(0)(
        [{"input_ids": toy.tokenizer()(row["text"])["input_ids"]} for row in rows]
    )


def reversing(rows):
    return DataCollatorForLanguageModeling(0)(list(rows)[::-1])


def with_names(rows):
    return {**DataCollatorForLanguageModeling(0)(rows), "names": ["x"] * len(rows)}


@pytest.mark.parametrize(
    ("collate", "settings", "said"),
    [
        (
            tokenising,
            {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False},
            "replay: the data collator tokenising cannot collate rows of input_ids and labels .KeyError: 'text'",
        ),
        (
            reversing,
            {},
            "replay: The data collator returned different tokens than the replay rows hold, or a different order",
        ),
        (with_names, {}, "replay: The batch key 'names'"),
        (lambda rows: {"input_ids": torch.ones(3)}, {}, "cannot collate rows of input_ids and labels"),
    ],
)
def test_collators_that_cannot_take_rows_are_refused_at_construction(tmp_path, collate, settings, said):
    with pytest.raises(ValueError, match=said):
        build(tmp_path, old(), data_collator=collate, settings=settings)


def test_a_collator_is_tried_for_rows_that_are_never_mixed(tmp_path):
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    with pytest.raises(ValueError, match="kif: the data collator tokenising cannot collate"):
        build(tmp_path, KIF(toy.rows(seed=3)), data_collator=tokenising, settings=settings)


def test_trying_a_collator_draws_no_random_number(tmp_path):
    def drawing(rows):
        torch.rand(3)
        return DataCollatorForLanguageModeling(0)(rows)

    states = []
    for collate in (None, drawing):
        build(tmp_path, old(), data_collator=collate)
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)


SOFT = {
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("soft", SOFT)
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_virtual_tokens_are_of_no_source(tmp_path, soft, weight):
    """The loss by hand: sums of task and replay from the model's own logits, over TRL's count of tokens."""
    trainer = build(
        tmp_path, old(weight=weight), peft_config=SOFT[soft](), settings={"max_steps": 1, "learning_rate": 0.0}
    )
    (batch,) = spied(trainer)
    source, labels = batch[ORIGIN]["source"], batch["labels"]
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    size = labels.shape[1]
    virtual = logits.shape[1] - size
    first = 0 if virtual else 1  # with virtual tokens in front, the first token is predicted too
    predicted = logits[:, virtual - 1 : -1] if virtual else logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(predicted.transpose(1, 2), labels[:, first:], reduction="none")
    sums = {k: float(nll[(source[:, first:] == k) & (labels[:, first:] != -100)].sum()) for k in (-1, 0)}
    counts = {k: int(((source == k) & (labels != -100))[:, 1:].sum()) for k in (-1, 0)}
    wanted = (sums[-1] + weight * sums[0]) / (counts[-1] + weight * counts[0])
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(wanted, rel=1e-4)
    for k, name in ((-1, "task"), (0, "replay")):
        count = int(((source == k) & (labels != -100))[:, first:].sum())
        assert entry[f"{name}/loss"] == pytest.approx(sums[k] / count, rel=1e-4)
