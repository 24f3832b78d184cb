"""MaskSurprising: the masked tokens by hand, the base that is asked, packing, and what the other methods see."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from rich.console import Console
from torch.nn.functional import cross_entropy

from hf_continual import LAMOL, ContinualConfig, ContinualTrainer, MaskSurprising, Method
from hf_continual.data.flat_rows import UNMASKED, flat_rows, with_labels
from hf_continual.methods.base_pass import negative_log_likelihood
from hf_continual.methods.mask_surprising import masked_labels
from hf_continual.stream.cost_report import dry_run_report
from hf_continual.stream.dry_run import describe
from hf_continual.stream.prepare import prepare
from hf_continual.stream.preview import previews
from hf_continual.stream.read_plan import read_plan
from hf_continual.trainer import hand_over
from tests import toy
from tests.stream import world

CACHE = "build/test-base"
ZERO_TOLERANCE = 0.0
SHORTER = {"threshold": 62.0, "cache_dir": CACHE}  # no token of an untrained toy has a perplexity below 2.5
EXTRA_FORWARDS = 1  # the head is compared with the model's own logits


def example(world):
    return MaskSurprising(threshold=62.0, cache_dir=CACHE)  # about half of the tokens of an untrained toy


def zero(world):
    return MaskSurprising(threshold=math.inf, cache_dir=CACHE)


def built(folder, *methods, model=None, rows=None, peft=None, **settings):
    """A trainer whose methods have made their preliminary passes."""
    trainer = ContinualTrainer(
        model or toy.model(), ContinualConfig(**toy.settings(folder, **settings)), train_dataset=rows or toy.rows(),
        processing_class=toy.tokenizer(), peft_config=peft, methods=methods,
    )  # fmt: skip
    hand_over.before_training(trainer)
    return trainer


def stm(folder, threshold=62.0, **options):
    return MaskSurprising(threshold, cache_dir=str(folder / "cache"), **options)


def test_numbers_by_hand():
    """Probabilities 0.5, 0.4 and 0.1 of four tokens to predict: perplexities 2, 2.5 and 10."""
    nll = -np.log(np.array([0.5, 0.4, 0.1], dtype=np.float32))
    labels, predicted = np.array([7, 8, -100, 9, 6]), np.array([False, True, False, True, True])
    assert masked_labels(labels, predicted, nll, 3.0).tolist() == [7, 8, -100, 9, -100]
    assert masked_labels(labels, predicted, nll, 2.1).tolist() == [7, 8, -100, -100, -100]
    assert masked_labels(labels, predicted, nll, 1.0).tolist() == [7, -100, -100, -100, -100]
    assert masked_labels(labels, predicted, nll, math.inf).tolist() == labels.tolist()
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.4, 0.5]])) + 3  # a shift of all logits changes nothing
    found = negative_log_likelihood(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([math.log(2), math.log(2.5)]), rtol=1e-6, atol=0)


def by_hand(model, ids, labels, threshold):
    """Labels of one document, computed without the library."""
    ids, labels = torch.tensor(ids), torch.tensor(labels)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids[None]).logits[0, :-1]
    surprising = cross_entropy(logits, ids[1:], reduction="none").exp() > threshold
    return [int(labels[0]), *torch.where(surprising, -100, labels[1:]).tolist()]


@pytest.mark.parametrize("kind", ["text", "prompt_completion", "messages", "tokenized"])
def test_the_masked_tokens_are_those_of_the_base(tmp_path, kind, caplog):
    caplog.set_level(logging.INFO)
    trainer = built(tmp_path, stm(tmp_path), rows=toy.rows(kind))
    given, edited = trainer.rows_as_given, trainer.train_dataset
    assert edited["input_ids"][:] == given["input_ids"][:] and edited[UNMASKED][:] == given["labels"][:]
    base = toy.model()
    expected = [by_hand(base, row["input_ids"], row["labels"], 62.0) for row in given]
    assert edited["labels"][:] == expected
    before = sum(label != -100 for row in given for label in row["labels"][1:])
    after = sum(label != -100 for row in expected for label in row[1:])
    assert 0 < after < before
    assert f"{before - after:,} of {before:,} tokens" in caplog.text
    trainer.train()
    assert toy.logs(trainer)[0]["mask_surprising/masked"] == pytest.approx((before - after) / before)


def test_packed_documents_are_read_alone(tmp_path):
    """Each document of a packed row is masked as it is in a row of its own."""
    packed = built(tmp_path, stm(tmp_path), packing=True, max_length=32)
    row, base = packed.rows_as_given[0], toy.model()
    expected, start = [], 0
    for length in row["seq_lengths"]:
        part = slice(start, start + length)
        expected += by_hand(base, row["input_ids"][part], row["labels"][part], 62.0)
        start += length
    assert len(row["seq_lengths"]) > 1 and packed.train_dataset[0]["labels"] == expected
    assert packed.train_dataset["seq_lengths"][:] == packed.rows_as_given["seq_lengths"][:]
    packed.train()


def test_flat_rows():
    rows = Dataset.from_dict(
        {"input_ids": [[1, 2, 3], [4, 5]], "labels": [[1, -100, 3], [4, 5]], "seq_lengths": [[2, 1], [2]]}
    )
    flat = flat_rows(rows, "X")
    assert flat.predicted_T.tolist() == [False, False, False, False, True]  # 3 is the first of its document
    (document,) = flat.reading()
    assert document.tokens.tolist() == [4, 5] and document.predicted.tolist() == [1] and len(document) == 1
    chosen = rows.select([1, 0])  # through an index, as after a shuffle
    flat = flat_rows(chosen, "X")
    assert flat.tokens_T.tolist() == [4, 5, 1, 2, 3] and flat.rows.tolist() == [0, 2, 5]
    assert flat.first(1).documents.tolist() == [0, 2] and flat.first(1).tokens_T.tolist() == [4, 5]
    edited = with_labels(with_labels(chosen, flat, np.arange(5)), flat, np.arange(5) + 1)
    assert edited["labels"][:] == [[1, 2], [3, 4, 5]] and edited[UNMASKED][:] == [[4, 5], [1, -100, 3]]
    with pytest.raises(ValueError, match="X reads the task's tokens before training, but the rows have no labels"):
        flat_rows(rows.remove_columns("labels"), "X")


def test_the_base_is_asked_and_not_the_adapter(tmp_path):
    """An adapter that has learned something is switched off; with reference='task_start' it is on."""
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    labels = {}
    for reference in ("base", "task_start"):
        trainer = built(tmp_path, stm(tmp_path, reference=reference), peft=lora)
        assert all(p.requires_grad for n, p in trainer.model.named_parameters() if "lora_" in n)
        labels[reference] = trainer.train_dataset["labels"][:]
    plain = built(tmp_path, stm(tmp_path)).train_dataset["labels"][:]
    assert labels["base"] == plain != labels["task_start"]


def test_the_pass_is_made_once(tmp_path, monkeypatch):
    from hf_continual.methods import base_pass

    calls = []
    original = base_pass.last_hidden
    monkeypatch.setattr(base_pass, "last_hidden", lambda *a: (calls.append(1), original(*a))[1])
    first = built(tmp_path, stm(tmp_path))
    assert len(calls) == 1 + 24  # one to check the head
    assert built(tmp_path, stm(tmp_path, threshold=60.0)).train_dataset["labels"][:] != first.train_dataset["labels"][:]
    assert len(calls) == 2 + 24, "another threshold needs no other pass"
    first.train()
    first.train()
    assert len(calls) == 2 + 24, "a second call of train keeps to what the base said before the first"
    built(tmp_path, stm(tmp_path), model=toy.model(seed=1))
    assert len(calls) == 3 + 48, "another base is asked itself"


def test_accumulation_sees_an_ordinary_dataset(tmp_path):
    found = []
    for size, steps in ((4, 1), (2, 2)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = built(tmp_path, stm(tmp_path), **settings)
        trainer.train()
        found.append(toy.flat(trainer.model))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


class Adds(Method):
    """A method that adds rows after the task's."""

    name = "adds"

    def edit_rows(self, run, rows):
        return concatenate_datasets([rows, Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])])


def test_added_rows_are_not_masked(tmp_path):
    alone = built(tmp_path, stm(tmp_path), rows=toy.rows("tokenized")).train_dataset["labels"][:]
    edited = built(tmp_path, Adds(), stm(tmp_path), rows=toy.rows("tokenized"))
    assert edited.train_dataset["labels"][:] == [*alone, [5, 6, 7]]
    edited.train()
    hand_over.before_training(edited)  # as a second call of train does
    assert edited.train_dataset["labels"][:] == [*alone, [5, 6, 7]]


@pytest.mark.parametrize("first", [True, False])
def test_lamol_pairs_rows_with_their_own_answers(tmp_path, first):
    """Masked labels have gaps, which LAMOL would take for a conversation of several turns."""
    lamol = LAMOL(gamma=0, lm_weight=0.3, gen_marker="w57", answer_marker="w58")
    methods = [stm(tmp_path), lamol] if first else [lamol, stm(tmp_path)]
    for settings in ({}, {"packing": True, "max_length": 40}):
        trainer = built(tmp_path, *methods, rows=toy.rows("prompt_completion"), **settings)
        row = trainer.train_dataset[0]
        batch = next(iter(trainer.get_train_dataloader()))
        assert UNMASKED in row and UNMASKED not in batch
        trainer.train()


def test_the_dry_run_prints_the_share(tmp_path):
    plan = world.make(
        tmp_path, methods=[{"mask_surprising": {"threshold": 62.0, "cache_dir": str(tmp_path / "cache")}}]
    )
    prepared = prepare(*read_plan(plan))
    said = previews(prepared)
    assert len(said) == 3 and not (tmp_path / "cache").exists()
    trainer = built(tmp_path, stm(tmp_path), rows=prepared.stream[0].train)
    masked, total = next(iter(trainer.methods))._counts
    assert said[0] == (
        f"t0: mask_surprising masks {100 * masked / total:.0f} % of the tokens, {masked} of {total} in the first 8 rows"
    )
    assert said[1].endswith("(measured on the model that the plan starts from)")
    shown = Console(record=True, width=150)
    shown.print(dry_run_report([("", {**describe(prepared), "previews": said})]))
    assert said[0] in shown.export_text()
    plan["methods"] = [{"mask_surprising": {"threshold": math.inf}}]
    assert previews(prepare(*read_plan(plan))) == []


def test_sentences(tmp_path):
    for wrong, kind, said in (
        ({"threshold": 0.9}, ValueError, "must be at least 1: it is a perplexity"),
        ({"threshold": math.nan}, ValueError, "must be at least 1"),
        ({"threshold": "2.5"}, TypeError, "must be a number"),
        ({"reference": "start"}, ValueError, "must be one of base, task_start"),
        ({"name": "a/b"}, ValueError, "a name is a word without '/'"),
    ):
        with pytest.raises(kind, match=said):
            MaskSurprising(**wrong)
    with pytest.raises(
        ValueError, match=r"masks all \d+ tokens of the task: the lowest perplexity is .* the median is"
    ):
        built(tmp_path, stm(tmp_path, threshold=1.0))
    blank = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, -100, -100]}] * 4)
    with pytest.raises(ValueError, match="none of the 4 rows has a token to predict"):
        built(tmp_path, stm(tmp_path), rows=blank)
    with pytest.raises(ValueError, match="but they are a stream"):
        built(tmp_path, stm(tmp_path), rows=toy.rows().to_iterable_dataset())


def test_a_run_is_not_resumed_with_another_base(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    built(tmp_path, stm(tmp_path), **settings).train()
    other = built(tmp_path, stm(tmp_path), model=toy.model(seed=1), **settings)
    with pytest.raises(ValueError, match="MaskSurprising: the run to resume began with another base"):
        other.train(resume_from_checkpoint=True)
