"""The plan's buffer: rows kept, handed on by folder, requested by methods, forbidden, and the same after a kill."""

from __future__ import annotations

import io
import os
import signal
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset
from rich.console import Console

from hf_continual import train_stream
from hf_continual.atomic_files import read_lines
from hf_continual.data.buffer import ORIGIN
from hf_continual.data.replay import ReplayRows
from hf_continual.data.rows import load_rows
from hf_continual.methods.base import Method
from hf_continual.paper import Paper
from hf_continual.stream.cost_report import dry_run_report
from hf_continual.stream.dry_run import describe
from hf_continual.stream.plan_lines import PlanError
from hf_continual.stream.prepare import prepare
from hf_continual.stream.read_plan import read_plan
from tests.stream import world

REPLAY = [{"replay": {"rows": "kept", "ratio": 0.3}}]
POLICIES = {
    "class_balanced": {"rows": 3},
    "reservoir": {"policy": "reservoir", "capacity": 5},
    "newest_first": {"policy": "newest_first", "capacity": 5, "share": 0.5},
}


@dataclass
class Remembering(Method):
    """A method with an option called `memory`, like KIF."""

    memory: Dataset | str | list[dict[str, Any]] | None = None
    name: ClassVar[str] = "remembering"
    paper: ClassVar[Paper] = Paper("None", "None", 2025)

    def replay(self, run):
        return None if self.memory is None else ReplayRows(load_rows(self.memory), per_batch=1)


REMEMBERING = f"{__name__}:Remembering"


def make(folder, **changes):
    """A plan of three tasks that scores nothing."""
    plan = world.make(folder, **changes)
    plan["sft"] |= {"max_steps": 3, "save_steps": 2}
    plan["evaluation"] = {"base": False, "bootstrap": 0}
    plan["tasks"] = [{"name": task["name"], "train": task["train"]} for task in plan["tasks"]]
    return plan


def file_of(folder, task):
    return folder / f"task-0{task}-t{task}" / "continual" / "memory.jsonl"


def plain(rows):
    return [{k: v for k, v in row.items() if k not in ORIGIN} for row in rows]


def without_order(rows):
    return sorted(str(sorted(row.items())) for row in rows)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_next_task_is_given_what_the_folder_holds(tmp_path, policy):
    plan = make(tmp_path, methods=REPLAY, memory=POLICIES[policy])
    prepared = prepare(*read_plan(plan))
    train_stream(plan)
    assert prepared.methods(prepared.stream[0]) == []
    for i in range(3):
        kept = read_lines(file_of(tmp_path / "out", i))
        assert len(kept) == {"class_balanced": 3 * (i + 1), "reservoir": 5, "newest_first": min(4 * (i + 1), 5)}[policy]
        for row in kept:
            whose = prepared.stream[int(row["memory_task"][1])]
            assert whose.index <= i and row["memory_source"] == plan["tasks"][whose.index]["train"]
            assert whose.train[row["memory_row"]] == plain([row])[0] and row["memory_seen"] == 8 * (i + 1)
        if i < 2:
            (method,) = prepared.methods(prepared.stream[i + 1])
            assert without_order(method.rows) == without_order(plain(kept)), "the origin is not replayed"
            assert method.rows.column_names == ["prompt", "completion"]
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_file_of_another_run_trains_the_same(tmp_path):
    """By `rows: PATH` with its origin columns, and by `start`: the same weights as `kept` in one run."""
    plan = make(tmp_path, memory={"rows": 4})
    plan["tasks"] = plan["tasks"][:2]
    train_stream({**plan, "methods": [{REMEMBERING: {"memory": "kept"}}]})
    file = str(file_of(tmp_path / "out", 0))
    by_path = [{}, {"methods": [{REMEMBERING: {"memory": file}}]}]
    tasks = [{**task, **own} for task, own in zip(plan["tasks"], by_path, strict=True)]
    train_stream({**plan, "memory": None, "output_dir": str(tmp_path / "path"), "tasks": tasks})
    first = str(tmp_path / "out" / "task-00-t0")
    train_stream(
        plan, model=first, tasks=plan["tasks"][1:], memory={"rows": 4, "start": file}, output_dir=str(tmp_path / "start"),
        methods=[{REMEMBERING: {"memory": "kept"}}],
    )  # fmt: skip
    wanted = world.weights(tmp_path / "out" / "task-01-t1")
    assert torch.equal(world.weights(tmp_path / "path" / "task-01-t1"), wanted)
    assert torch.equal(world.weights(tmp_path / "start" / "task-00-t1"), wanted)
    assert not torch.equal(world.weights(tmp_path / "out" / "task-00-t0"), wanted)
    handed_on = read_lines(tmp_path / "start" / "task-00-t1" / "continual" / "memory.jsonl")
    assert [(r["memory_task"], r["memory_seen"]) for r in handed_on] == [("t0", 16)] * 4 + [("t1", 16)] * 4
    assert handed_on[0]["memory_source"] == plan["tasks"][0]["train"]
    os.replace(file_of(tmp_path / "out", 1), file)
    with pytest.raises(PlanError, match=r"memory.start.sha256: '\w+' -> '\w+'"):
        train_stream(
            plan, model=first, tasks=plan["tasks"][1:], memory={"rows": 4, "start": file},
            output_dir=str(tmp_path / "start"), methods=[{REMEMBERING: {"memory": "kept"}}],
        )  # fmt: skip


def test_what_methods_may_ask_for(tmp_path):
    values = [
        ("earlier_tasks", [None, 8, 16]),
        ({"earlier_tasks": 2, "of": ["t1"]}, [None, None, 2]),
        ("kept", [None, 3, 6]),
        ({"kept": None, "of": ["t0"]}, [None, 3, 3]),
        ({"kept": 2}, [None, 2, 4]),
        (str(tmp_path / "t0.jsonl"), [8, 8, 8]),
        ([{"prompt": "w1", "completion": " w2"}], [1, 1, 1]),
        (None, [0, 0, 0]),
    ]
    for value, wanted in values:
        prepared = prepare(
            *read_plan(make(tmp_path, memory={"rows": 3}, methods=[{REMEMBERING: {"memory": value}}, "recadam"]))
        )
        found = []
        for task in prepared.stream:
            methods = [m for m in prepared.methods(task) if isinstance(m, Remembering)]
            assert len(prepared.methods(task)) == len(methods) + 1
            memory = methods[0].memory if methods else None
            found.append(None if not methods else 0 if memory is None else len(load_rows(memory)))
        assert found == wanted, value


def test_kept_rows_of_another_type(tmp_path):
    plan = make(tmp_path, memory={"rows": 3}, methods=REPLAY)
    plan["tasks"][1] = {"name": "t1", "train": str(tmp_path / "general.jsonl"), "parent": "t0"}
    plan["tasks"][1]["methods"] = [{"replay": {"rows": "kept", "ratio": 0.3, "row_type": "prompt_completion"}}]
    with pytest.raises(
        PlanError, match=r"the earlier task 't1' have the columns \['text'\] .* rows: \{kept: NUMBER, of"
    ):
        prepare(*read_plan(plan))
    plan["tasks"][2]["methods"] = [{"replay": {"rows": {"kept": None, "of": ["t0"]}, "ratio": 0.3}}]
    train_stream(plan)
    kept = read_lines(file_of(tmp_path / "out", 2))
    assert [set(plain([row])[0]) for row in kept] == [{"prompt", "completion"}] * 3 + [{"text"}] * 3 + [
        {"prompt", "completion"}
    ] * 3
    plan["tasks"][2]["methods"][0]["replay"]["rows"]["of"] = ["t8"]
    with pytest.raises(PlanError, match="of lists the task 't8', which does not exist"):
        prepare(*read_plan(plan))


def test_a_branch_remembers_its_own_line(tmp_path):
    plan = make(tmp_path, memory={"rows": 2}, methods=REPLAY)
    plan["tasks"][2]["parent"] = "t0"
    memory = prepare(*read_plan(plan)).memory
    assert [row["memory_task"] for row in memory.after["t2"]] == ["t0"] * 2 + ["t2"] * 2


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A plan that was left alone."""
    folder = tmp_path_factory.mktemp("straight")
    plan = make(folder, methods=REPLAY, memory=POLICIES["reservoir"])
    train_stream(plan)
    return plan, folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the file", "inside the file", "after the file"])
def test_killed_while_it_is_written(straight, tmp_path, moment):
    plan, wanted = straight
    plan = {**plan, "output_dir": str(tmp_path / "out")}
    child = os.fork()
    if child == 0:
        try:
            from hf_continual import atomic_files
            from hf_continual.stream import learner

            def killed(path, rows):
                second = "task-01" in str(path)
                if moment == "inside the file" and second:
                    atomic_files.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
                if moment != "before the file" or not second:
                    atomic_files.write_lines(path, rows)
                if second:
                    os.kill(os.getpid(), signal.SIGKILL)

            learner.write_lines = killed
            train_stream(plan)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    partial = tmp_path / "out" / "task-01-t1.partial" / "continual"
    assert (partial / "memory.jsonl").is_file() == (moment == "after the file")
    train_stream(plan)
    for i in range(3):
        assert file_of(tmp_path / "out", i).read_bytes() == file_of(wanted, i).read_bytes()
        undisturbed, resumed = (world.weights(out / f"task-0{i}-t{i}") for out in (wanted, tmp_path / "out"))
        assert torch.equal(undisturbed, resumed)
    assert not list((tmp_path / "out").rglob("*.partial"))


ASKING = {
    "rows": (["methods"], [{"freeze": {"bottom": 1}}, {"replay": {"rows": "earlier_tasks", "ratio": 0.1}}]),
    "a number of rows": (["methods"], {"replay": {"rows": {"earlier_tasks": 5}, "ratio": 0.1}}),
    "kept": (["methods"], [{"replay": {"rows": "kept", "ratio": 0.1}}]),
    "memory": (["methods"], [{REMEMBERING: {"memory": "earlier_tasks"}}]),
    "of a task": (["tasks", 1, "methods"], [{REMEMBERING: {"memory": {"kept": 3}}}]),
    "of an arm": (["sweep"], {"methods": {"a": [], "b": [{"replay": {"rows": "earlier_tasks", "ratio": 0.1}}]}}),
    "a task's file": (["tasks", 2, "methods"], [{"replay": {"rows": "t0.jsonl", "ratio": 0.1}}]),
}


@pytest.mark.parametrize("case", ASKING)
def test_data_free_runs_refuse_what_asks_for_rows(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    plan = make(tmp_path, memory="forbidden")
    plan["tasks"][0]["train"] = "t0.jsonl"
    *path, last = ASKING[case][0]
    at = plan
    for key in path:
        at = at[key]
    at[last] = ASKING[case][1]
    file = world.write(tmp_path, plan)
    with pytest.raises(
        PlanError, match="memory: forbidden, and this asks for rows that a task is trained on"
    ) as refused:
        train_stream(file)
    line = int(str(refused.value).removeprefix(f"{file}, line ").split(",")[0])
    text = file.read_text().splitlines()[line - 1]
    assert text.strip().startswith(("rows:", "memory:")), text
    assert not (tmp_path / "out").exists()


def test_data_free_runs_take_other_rows_and_keep_none(tmp_path):
    general = str(tmp_path / "general.jsonl")
    methods = [{"replay": {"rows": general, "ratio": 0.2, "row_type": "text"}}]
    plan = make(tmp_path, memory="forbidden", methods=methods)
    plan["tasks"] = plan["tasks"][:1]
    train_stream(plan)
    assert not list((tmp_path / "out").rglob("memory.jsonl"))
    with pytest.raises(PlanError, match="memory: 'forbidden' -> {"):
        train_stream({**plan, "memory": {"rows": 3}})


BAD = {
    "no memory": (
        None,
        "rows: kept asks for kept rows, but the plan keeps none",
        "methods[0].replay.rows",
    ),
    "unknown key": ({"polcy": "reservoir"}, "unknown key 'polcy'. Did you mean 'policy'? Known are policy", "memory"),
    "unknown policy": ({"policy": "fifo"}, "got 'fifo' (str): expected 'class_balanced', 'reservoir' or", "memory"),
    "a word": ("none", "got 'none' (str): expected 'forbidden'", "memory"),
    "both": ({"share": 0.1, "rows": 3}, "class_balanced takes share or rows", "memory"),
    "no capacity": ({"policy": "reservoir"}, "reservoir a capacity (of all tasks together)", "memory"),
    "wrong type": ({"rows": "many"}, "got 'many' (str): expected a valid integer", "memory.rows"),
    "no column": ({"by": "kind"}, "by: the rows of task 't0' have no 'kind'", "memory"),
    "no file": ({"start": "gone.jsonl"}, "gone.jsonl", "memory.start"),
    "no origin": ({"start": "t0.jsonl"}, "a row of start has no 'memory_task'", "memory"),
    "empty": ({"start": "empty.jsonl"}, "empty.jsonl holds no rows", "memory.start"),
    "no JSON": ({"start": "plan.yaml"}, "plan.yaml", "memory.start"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_memories_say_where_and_what(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    memory, message, place = BAD[case]
    (tmp_path / "empty.jsonl").touch()
    file = world.write(tmp_path, {**make(tmp_path, methods=REPLAY), "memory": memory})
    with pytest.raises(PlanError) as refused:
        train_stream(file)
    said = str(refused.value)
    assert message in said and f", {place}" in said and said.startswith(f"{file}, line "), said
    assert not (tmp_path / "out").exists()


def test_another_memory_is_another_plan(tmp_path):
    plan = make(tmp_path, memory={"rows": 3})
    plan["tasks"] = plan["tasks"][:1]
    train_stream(plan)
    with pytest.raises(PlanError, match="memory.rows: 3 -> 4"):
        train_stream({**plan, "memory": {"rows": 4}})
    with pytest.raises(PlanError, match="memory: {.* -> None"):
        train_stream({**plan, "memory": None})


def test_the_dry_run_says_what_is_kept(tmp_path):
    said = describe(prepare(*read_plan(make(tmp_path, memory={"rows": 3}, methods=REPLAY))))
    assert [t["memory_rows"] for t in said["tasks"]] == [{"given": 3 * i, "kept": 3 * (i + 1)} for i in range(3)]
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(dry_run_report([("", said)]))
    assert "t1: given 3, hands on 6" in console.export_text()
    said = describe(prepare(*read_plan(make(tmp_path))))
    assert [t["memory_rows"] for t in said["tasks"]] == [None] * 3


def test_rows_with_any_character_are_handed_on(tmp_path):
    """U+0085 and U+2028 end a line for Python but not for JSON."""
    odd = [{"prompt": f"w1\x85w2\u2028w{i}", "completion": " w3"} for i in range(4)]
    plan = make(tmp_path, memory={"rows": 4})
    plan["tasks"] = [{"name": "t0", "train": Dataset.from_list(odd)}]
    train_stream(plan)
    kept = read_lines(file_of(tmp_path / "out", 0))
    assert without_order(plain(kept)) == without_order(odd) and kept[0]["memory_source"] == "rows in Python"
    start = prepare(*read_plan({**plan, "memory": {"rows": 4, "start": str(file_of(tmp_path / "out", 0))}}))
    assert start.memory.start == kept


def test_kif_is_plain_on_the_first_task_and_fuses_on_later_ones(tmp_path):
    plan = make(tmp_path, methods=[{"kif": {"memory": "kept", "inner_steps": 2, "outer_steps": 2}}], memory={"rows": 4})
    plan["sft"] |= {"max_steps": 4, "learning_rate": 1e-2}
    told = describe(prepare(*read_plan(plan)))
    assert [t["methods"] for t in told["tasks"]] == [[], ["kif"], ["kif"]]
    assert [(t["steps"], t["extra_steps"]) for t in told["tasks"]] == [(4, 0), (4, 4), (4, 4)]
    shown = Console(file=io.StringIO(), width=160)
    shown.print(dry_run_report([("", told)]))
    assert "4 + 4" in shown.file.getvalue()
    train_stream(plan)
    plain_plan = {**plan, "methods": [], "memory": None, "output_dir": str(tmp_path / "plain")}
    train_stream(plain_plan)
    same = [torch.equal(world.weights(tmp_path / "out" / t), world.weights(tmp_path / "plain" / t)) for t in
            ("task-00-t0", "task-01-t1")]  # fmt: skip
    assert same == [True, False]
