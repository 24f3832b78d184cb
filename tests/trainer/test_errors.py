"""Bad input: a typed error before anything is written, and nothing lost."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from trl import SFTConfig

from hf_continual import ContinualConfig, ContinualTrainer, FreezeLayers, Method, Paper, RecAdam, Replay
from tests import toy


def build(folder, *methods, settings=None, config=SFTConfig, **arguments):
    return ContinualTrainer(
        **{
            "model": toy.model(),
            "args": config(**toy.settings(folder, **(settings or {}))),
            "train_dataset": toy.rows(),
            "processing_class": toy.tokenizer(),
            "methods": methods,
            **arguments,
        }
    )


class Silent(Method):
    name = "silent"
    paper = Paper("x", "y", 2020)


class Reads(Silent):
    name = "reads"

    def loss_terms(self, forward):
        return {"zero": forward.token_loss_BS.sum() * 0}


class Taps(Reads):
    taps = ("model.layers.9",)


def nothing():
    yield from ()


SGD = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
CASES = {
    "empty": (
        lambda t: build(t, train_dataset=Dataset.from_dict({"text": []})),
        ValueError,
        "train_dataset has 0 rows",
    ),
    "no dataset": (lambda t: build(t, Silent(), train_dataset=None), ValueError, "`train_dataset` is required"),
    "a list": (lambda t: build(t, Silent(), train_dataset=[1]), TypeError, "must be a `Dataset`"),
    "empty stream": (
        lambda t: build(t, Silent(), train_dataset=IterableDataset.from_generator(nothing)),
        ValueError,
        "a stream that yields no rows",
    ),
    "empty replay": (lambda t: build(t, Replay(Dataset.from_dict({"text": []}), ratio=0.1)), ValueError, "has no rows"),
    "missing file": (lambda t: build(t, Replay("gone.jsonl", ratio=0.1)), FileNotFoundError, "gone.jsonl"),
    "two optimizers": (
        lambda t: build(t, RecAdam(), **SGD),
        ValueError,
        "RecAdam supplies an optimizer and optimizer_cls",
    ),
    "optimizer object": (
        lambda t: build(t, RecAdam(), optimizers=(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), None)),
        ValueError,
        r"optimizers=\(SGD",
    ),
    "other optim": (lambda t: build(t, RecAdam(), settings={"optim": "adafactor"}), ValueError, "optim='adafactor'"),
    "given twice": (
        lambda t: build(t, config=ContinualConfig, settings={"methods": "recadam"}),
        ValueError,
        "methods are given twice",
    ),
    "not a method": (lambda t: build(t, "recadam"), TypeError, "got str"),
    "tokenizer=": (
        lambda t: build(t, tokenizer=1),
        TypeError,
        "'tokenizer' is the spelling of an older.*processing_class",
    ),
    "max_seq_length=": (lambda t: build(t, max_seq_length=1), TypeError, r"ContinualConfig\(max_length"),
    "smoothing": (
        lambda t: build(t, Reads(), settings={"label_smoothing_factor": 0.1}),
        ValueError,
        "Reads must read the forward pass",
    ),
    "weighted smoothing": (
        lambda t: build(t, Replay(toy.rows(), ratio=0.1, weight=0.5), settings={"label_smoothing_factor": 0.1}),
        ValueError,
        "Replay needs weight=1",
    ),
    "no such module": (lambda t: build(t, Taps()), ValueError, "No module is called 'model.layers.9'"),
    "too many blocks": (lambda t: build(t, FreezeLayers(bottom=99)), ValueError, "has 4 blocks"),
}


@pytest.mark.parametrize("case", CASES)
def test_sentences(tmp_path, case):
    make, error, said = CASES[case]
    with pytest.raises(error, match=said):
        make(tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"max_seq_length": 5}, TypeError, "Today it is max_length"),
        ({"evaluation_strategy": "steps"}, TypeError, "eval_strategy"),
        ({"methods": {"freez": {}}}, ValueError, "Did you mean 'freeze'"),
        ({"methods": {"freeze": {"bottom": "2"}}}, TypeError, "expected int"),
        ({"task_index": -1}, ValueError, "counted from 0"),
    ],
)
def test_sentences_of_the_configuration(tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        ContinualConfig(**toy.settings(tmp_path, **options))


def test_patterns_that_match_nothing_are_reported_when_training_begins(tmp_path):
    trainer = build(tmp_path, RecAdam(groups={"classifier": {"anneal_w": 0.0}}))
    with pytest.raises(ValueError, match="pattern 'classifier' matches none of the 39 trainable parameters"):
        trainer.train()
    with pytest.raises(ValueError, match="anchors no parameter"):
        build(tmp_path, RecAdam(anneal_w=0.0)).train()


def test_groups_have_their_own_options(tmp_path):
    trainer = build(
        tmp_path,
        RecAdam(anneal="none", pull=0.5, groups={"lm_head": {"anneal_w": 0.0}}),
        settings={"weight_decay": 0.1},
    )
    trainer.train()
    groups = trainer.run.optimizer.param_groups
    assert len(groups) == 3 and sorted((g["anneal_w"], g["weight_decay"]) for g in groups) == [
        (0.0, 0.1),
        (1.0, 0.0),
        (1.0, 0.1),
    ]


def test_resuming_needs_a_complete_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        build(tmp_path, Silent()).train(resume_from_checkpoint=True)


def test_streaming_replay_rows_are_refused():
    with pytest.raises(TypeError, match="streaming dataset has no length"):
        Replay(toy.rows().to_iterable_dataset(), ratio=0.1)
