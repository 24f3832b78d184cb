"""The loop over tasks' folders: complete or absent, finished tasks left alone, errors recorded."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_continual import Task, TaskStream
from hf_continual.atomic_files import read_json, read_lines, write_lines, write_text
from hf_continual.evaluation.exact_match import teacher_forced
from hf_continual.evaluation.files import SCORES, predictions_file
from hf_continual.stream.folders import TRAINED, train_tasks
from tests import toy


class Killed(BaseException):
    pass


class Tiny:
    """A learner whose training adds the task's number to one weight."""

    def __init__(self, out, kill=None):
        self.out, self.kill, self.learned, self.scored = out, kill, [], []
        rows = [toy.rows("prompt_completion", number=4, seed=i) for i in range(3)]
        self.stream = TaskStream([Task(f"t{i}", train=r, test=r) for i, r in enumerate(rows)])

    def columns(self, task):
        return self.stream.tasks[: task.index + 1]

    def learn(self, task, parent, folder):
        self.learned.append(task.name)
        model = toy.model() if parent is None else AutoModelForCausalLM.from_pretrained(parent)
        with torch.no_grad():
            model.model.norm.weight += task.index + 1
        model.save_pretrained(folder)
        (folder / "checkpoint-1").mkdir(exist_ok=True)
        if self.kill == ("training", task.name):
            raise Killed
        return {"name": task.name, "index": task.index}

    def score(self, folder, tasks, done):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for task in tasks:
            if self.kill == ("scoring", folder.name.removesuffix(".partial"), task.name):
                raise Killed
            self.scored.append((folder.name, task.name))
            done(task.name, teacher_forced(model, toy.tokenizer(), task.test))

    def run(self):
        return train_tasks(self.stream, self.out, self)


def norm(out):
    return AutoModelForCausalLM.from_pretrained(out / "task-02-t2").model.norm.weight


def test_a_killed_sequence_ends_like_an_undisturbed_one(tmp_path):
    straight = Tiny(tmp_path / "straight")
    matrix = straight.run()
    assert [len([v for v in row if v is not None]) for row in matrix.scores] == [1, 2, 3]
    assert sorted(p.name for p in straight.out.iterdir()) == ["predictions", "task-00-t0", "task-01-t1", "task-02-t2"]
    assert not list(straight.out.rglob("checkpoint-*"))
    for kill in (("training", "t1"), ("scoring", "task-01-t1", "t1"), ("scoring", "task-00-t0", "t0")):
        out = tmp_path / "-".join(kill)
        with pytest.raises(Killed):
            Tiny(out, kill).run()
        resumed = Tiny(out)
        assert resumed.run() == matrix
        assert torch.equal(norm(out), norm(straight.out))
        if kill[0] == "scoring":
            trained = kill[1][-2:]
            assert trained not in resumed.learned, "its model was saved before it was scored"
            assert (f"{kill[1]}.partial", "t0") not in resumed.scored or kill[2] == "t0"


def test_finished_tasks_are_not_learned_or_scored_again(tmp_path):
    Tiny(tmp_path).run()
    again = Tiny(tmp_path)
    again.run()
    assert again.learned == [] and again.scored == []
    assert read_json(tmp_path / "task-01-t1" / TRAINED)["name"] == "t1"
    assert set(read_json(tmp_path / "task-01-t1" / SCORES)) == {"t0", "t1"}
    lines = read_lines(predictions_file(tmp_path, "task-01-t1", "t0"))
    wanted = {"row_id", "prompt", "prompt_hash", "prediction", "reference", "score", "nll"}
    assert set(lines[0]) == wanted and len(lines) == 4


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    from pathlib import Path

    file = tmp_path / "a" / "b.jsonl"
    write_lines(file, [{"x": 1}, {"x": "ö"}])
    assert read_lines(file) == [{"x": 1}, {"x": "ö"}]

    def killed(self, target):
        raise Killed

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        write_text(file, "half")
    assert read_lines(file) == [{"x": 1}, {"x": "ö"}]


def test_streams_are_checked():
    with pytest.raises(ValueError, match="at least one task"):
        TaskStream([])
    with pytest.raises(ValueError, match="'a' must be unique"):
        TaskStream([Task("a"), Task("a")])
    with pytest.raises(ValueError, match="no '/'"):
        TaskStream([Task("a/b")])
    with pytest.raises(ValueError, match="'base' means the base model"):
        TaskStream([Task("base")])
    stream = TaskStream([Task("a"), Task("b")])
    assert [t.index for t in stream] == [0, 1] and stream[1].folder == "task-01-b" and len(stream) == 2


def test_parents():
    stream = TaskStream([Task("a"), Task("b"), Task("c", parent="a"), Task("d", parent="base")])
    parents = [getattr(stream.parent(t), "name", None) for t in stream]
    assert parents == [None, "a", "a", None]
    assert [t.name for t in stream.lineage(stream[2])] == ["a", "c"]
    with pytest.raises(ValueError, match="circular parents: b -> c -> b"):
        TaskStream([Task("a"), Task("b", parent="c"), Task("c", parent="b")])
    with pytest.raises(ValueError, match="circular parents: a -> a"):
        TaskStream([Task("a", parent="a")])
    with pytest.raises(ValueError, match="continues from 'x', which is not a task of this sequence"):
        TaskStream([Task("a"), Task("b", parent="x")])
    with pytest.raises(ValueError, match="'c', which is learned after it"):
        TaskStream([Task("a"), Task("b", parent="c"), Task("c", parent="a")])
