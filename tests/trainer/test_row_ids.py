"""Each token of the task is identified by its row and its place there, so that recorded values can be looked up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from datasets import IterableDataset

from hf_continual import ContinualConfig, ContinualTrainer, Method, Paper, Replay
from tests import toy


@dataclass
class Looking(Method):
    """Looks up every token in the row it is reported to come from."""

    name: ClassVar[str] = "looking"
    paper: ClassVar[Paper] = Paper("Looking", "Nobody", 2026)

    def reads_row_ids(self):
        return True

    def begin_task(self, run):
        self.run, self.rows, self.seen = run, run.task_rows["input_ids"][:], set()

    def loss_terms(self, forward):
        ids = forward.inputs["input_ids"]
        task = forward.mask()
        rows, places = forward.row_BS[task], forward.offset_BS[task]
        assert task.any() and forward.entropy_BS.shape == forward.token_loss_BS.shape
        for token, row, place in zip(ids[task].tolist(), rows.tolist(), places.tolist(), strict=True):
            assert self.rows[row][place] == token
        self.seen |= set(rows.tolist())
        padding = forward.source_BS == -100
        assert (forward.row_BS[padding] == -1).all() and (forward.offset_BS[padding] == -1).all()
        for k, name in enumerate(forward.sources):
            theirs = self.run.rows(next(m for m in self.run._trainer.methods if m.name == name))["input_ids"][:]
            here = forward.source_BS == k
            for token, row, place in zip(
                ids[here].tolist(), forward.row_BS[here], forward.offset_BS[here], strict=True
            ):
                assert theirs[row][place] == token
        return {}


LAYOUTS = {
    "padded": {},
    "one row": {"per_device_train_batch_size": 1, "max_steps": 24},
    "packed": {"packing": True, "max_length": 32},
    "padding-free": {"padding_free": True, "max_length": None},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "unused columns kept": {"remove_unused_columns": False},
}


@pytest.mark.parametrize("replay", [False, True], ids=["alone", "with replay"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*(padding-free|flash|Flash).*")
def test_tokens_are_where_they_are_reported_to_be(tmp_path, layout, replay):
    kind = "tokenized" if layout == "unused columns kept" else "text"
    methods = [method := Looking(), *([Replay(toy.rows(kind, seed=9), per_batch=2)] if replay else [])]
    settings = {"max_steps": 6, **LAYOUTS[layout]}
    rows = toy.rows(kind)
    trainer = ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(tmp_path, **settings)), train_dataset=rows,
        processing_class=toy.tokenizer(), methods=methods,
    )  # fmt: skip
    before = trainer.train_dataset.column_names
    trainer.train()
    assert trainer.train_dataset.column_names == before
    assert method.seen == set(range(len(trainer.train_dataset))), "every row was met once"


def test_the_run_is_the_same(tmp_path):
    """Naming rows changes neither their order nor the weights, bit for bit."""
    flat = []
    for looks in (True, False):
        method = Looking()
        method.reads_row_ids = lambda looks=looks: looks
        method.loss_terms = lambda forward: {}
        trainer = ContinualTrainer(
            toy.model(), ContinualConfig(**toy.settings(tmp_path)), train_dataset=toy.rows(),
            processing_class=toy.tokenizer(), methods=[method],
        )  # fmt: skip
        trainer.train()
        flat.append(toy.flat(trainer.model))
    assert torch.equal(*flat)


def test_streams_are_refused(tmp_path):
    rows = toy.rows()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(tmp_path, max_steps=2)), train_dataset=stream,
        processing_class=toy.tokenizer(), methods=[Looking()],
    )  # fmt: skip
    with pytest.raises(ValueError, match="they are a stream"):
        trainer.train()
