"""A task sequence: folders complete or absent, the matrix, and going on after a kill between or inside tasks."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from hf_continual import ContinualTrainer, Replay, Task
from hf_continual.evaluation.exact_match import teacher_forced
from hf_continual.tasks import TaskStream
from hf_continual.trainer.state import last_complete_checkpoint
from hf_continual.trainer.stream import train_tasks
from tests import toy


class Killed(Exception):
    pass


class Sequence:
    """Three tiny tasks; `kill` names a task and a moment."""

    def __init__(self, out, kill=None):
        self.out, self.kill, self.learnt = out, kill, []
        rows = [toy.rows("prompt_completion", number=8, seed=i) for i in range(3)]
        self.stream = TaskStream([Task(f"t{i}", train=r, test=r) for i, r in enumerate(rows)])

    def learn(self, task, previous, folder):
        self.learnt.append(task.index)
        model = toy.model() if previous is None else AutoModelForCausalLM.from_pretrained(previous)
        trainer = ContinualTrainer(
            model,
            SFTConfig(**toy.settings(folder, max_steps=6, save_strategy="steps", save_steps=2, learning_rate=5e-3)),
            train_dataset=task.train,
            processing_class=toy.tokenizer(),
            methods=[Replay(self.stream[task.index - 1].train, ratio=0.3)] if task.index else [],
        )
        if self.kill == ("inside", task.index):
            trainer.args.max_steps = 5
            trainer.train()
            raise Killed
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        return trainer

    def evaluate(self, trainer, task):
        if self.kill == ("evaluation", task.index):
            raise Killed
        answers = teacher_forced(trainer.model, toy.tokenizer(), task.test)
        return answers.exact, [{"right": r} for r in answers.right]

    def run(self):
        return train_tasks(self.stream, self.out, self.learn, self.evaluate)


def weights(out):
    return toy.flat(AutoModelForCausalLM.from_pretrained(out / "task-02-t2"))


def test_a_killed_sequence_ends_like_an_undisturbed_one(tmp_path):
    straight = Sequence(tmp_path / "straight")
    matrix = straight.run()
    assert [len([v for v in row if v is not None]) for row in matrix.scores] == [1, 2, 3]
    assert sorted(p.name for p in (tmp_path / "straight").iterdir()) == ["task-00-t0", "task-01-t1", "task-02-t2"]
    assert not list((tmp_path / "straight").rglob("checkpoint-*"))
    lines = (tmp_path / "straight" / "task-02-t2" / "continual" / "predictions" / "t0.jsonl").read_text().splitlines()
    hits = [json.loads(line)["right"] for line in lines]
    assert sum(hits) / 8 == matrix.scores[2][0]
    for moment in (("evaluation", 1), ("evaluation", 2), ("evaluation", 0)):
        out = tmp_path / f"{moment[0]}-{moment[1]}"
        with pytest.raises(Killed):
            Sequence(out, moment).run()
        resumed = Sequence(out)
        assert resumed.run() == matrix
        assert moment[1] == 0 or 0 not in resumed.learnt
        assert torch.equal(weights(out), weights(tmp_path / "straight"))


def test_finished_tasks_are_not_learnt_again(tmp_path):
    Sequence(tmp_path).run()
    again = Sequence(tmp_path)
    again.run()
    assert again.learnt == []


def test_streams_are_checked():
    with pytest.raises(ValueError, match="at least one task"):
        TaskStream([])
    with pytest.raises(ValueError, match="'a' must be used once"):
        TaskStream([Task("a"), Task("a")])
    with pytest.raises(ValueError, match="no '/'"):
        TaskStream([Task("a/b")])
    stream = TaskStream([Task("a"), Task("b")])
    assert [t.index for t in stream] == [0, 1] and stream[1].folder == "task-01-b" and len(stream) == 2
