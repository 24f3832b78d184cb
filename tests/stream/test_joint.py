"""`between_tasks: joint`: one run over all tasks' rows, in the same matrix, files, cards and sweeps as a sequence."""

from __future__ import annotations

import io
import signal

import pytest
import torch
from datasets import concatenate_datasets
from rich.console import Console

from hf_continual import (
    EWC,
    KIF,
    MIGU,
    ContinualConfig,
    ContinualTrainer,
    GeRe,
    OLoRA,
    RecAdam,
    Replay,
    Task,
    TaskStream,
    TaskVector,
    TaSL,
    train_stream,
)  # fmt: skip
from hf_continual.atomic_files import read_json, read_lines
from hf_continual.hub.card import render_card
from hf_continual.hub.lint import lint_folder
from hf_continual.stream.compare import compare_runs
from hf_continual.stream.dry_run import describe
from hf_continual.stream.plan_lines import PlanError
from hf_continual.stream.prepare import prepare
from hf_continual.stream.read_plan import read_plan
from hf_continual.stream.report import results_report
from tests import toy
from tests.stream import forked, world

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def make(folder, **changes):
    return world.make(folder, between_tasks="joint", **changes)


def shown(result) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(results_report(result.results))
    return out.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A joint run long enough to learn something."""
    folder = tmp_path_factory.mktemp("joint")
    plan = make(folder, sft={**world.SFT, "max_steps": 60, "learning_rate": 1e-2, "save_steps": 30})
    plan["evaluation"]["gauges"] = {"general": {"rows": str(folder / "general.jsonl"), "split": "train"}}
    return plan, train_stream(plan), folder / "out"


def test_the_one_run_is_the_last_row_of_the_matrix(trained):
    _, result, out = trained
    cells = []
    for j in range(3):
        rows = read_lines(out / "predictions" / f"task-00-joint.t{j}.jsonl")
        assert [r["row_id"] for r in rows] == list(range(8))
        cells.append(sum(r["score"] for r in rows) / 8)
    assert result.matrix.scores == [[None] * 3, [None] * 3, cells] and len(result.matrix.base) == 3
    figures = result.results["summary"]
    assert figures["overall_performance"] == pytest.approx(sum(cells) / 3)
    for name in ("learning_accuracy", "backward_transfer", "forward_transfer", "forgetting", "average_performance"):
        assert figures[name] is None, f"{name} compares moments, and there is one"
    low, high = result.results["intervals"]["overall_performance"]
    assert low <= figures["overall_performance"] <= high
    assert result.results["nll"]["scores"][:2] == [[None] * 3] * 2 and None not in result.results["nll"]["scores"][2]
    assert result.results["complete"] and result.results["between_tasks"] == "joint"
    assert set(result.results["cells"]) == {"base", "joint"}
    assert result.results["gauges"]["general"]["change"] is not None
    assert not list(out.glob("task-0[12]*")) and not list(out.rglob("checkpoint-*"))


def test_it_is_the_trainer_on_all_rows(tmp_path):
    plan = make(tmp_path)
    train_stream(plan)
    rows = concatenate_datasets([toy.rows("prompt_completion", number=8, seed=i) for i in range(3)])
    args = ContinualConfig(str(tmp_path / "alone"), seed=0, report_to="none", **world.SFT)
    trainer = ContinualTrainer(toy.model(), args, train_dataset=rows, processing_class=toy.tokenizer())
    trainer.train()
    assert torch.equal(world.weights(tmp_path / "out" / "task-00-joint"), toy.flat(trainer.model))


def test_the_tables_and_the_card_say_what_it_is(trained):
    _, result, out = trained
    text = shown(result)
    assert "all tasks at once" in text and "(base model)" in text and "not measured" in text
    assert "t2 " not in text.split("all tasks at once")[1].split("\n")[0]
    folder = out / "task-00-joint"
    card = render_card(folder)
    assert "learned 3 tasks in one run over all their rows (t0, t1, t2)" in card and "one after another (" not in card
    assert "Joint training: the rows of all tasks in one run" in card and "plain sequential" not in card
    assert "| all tasks at once | " in card and "After the last task" not in card
    assert card.count("this model |") >= 3, "every task was learned by this model"
    assert "| BWT | NOT_RUN |" in card and not [p for p in lint_folder(folder) if "NOT_RUN" not in str(p)]
    config = read_json(folder / "continual_config.json")
    assert config["training"] == "joint" and [t["train_rows"] for t in config["tasks"]] == [8, 8, 8]
    assert len({str(t["started_from"]) for t in config["tasks"]}) == 1 and "parent" not in config


def test_it_stands_beside_the_arms_of_a_sweep(tmp_path):
    arms = {"plain": {}, "joint": {"between_tasks": "joint", "sft": {"max_steps": 18}}}
    plan = world.make(tmp_path, sweep={"arms": arms, "seeds": [0, 1]})
    results = train_stream(plan).results
    out = tmp_path / "out"
    last = results["runs"]["joint-seed0"]["matrix"]["scores"]
    assert last[:2] == [[None] * 3] * 2 and None not in last[2]
    assert set(results["arms"]["joint"]["figures"]) == {"overall_performance"}
    assert "forgetting" in results["arms"]["plain"]["figures"]
    (compared,) = results["comparisons"]
    means = [results["arms"][a]["figures"]["overall_performance"]["mean"] for a in ("plain", "joint")]
    assert compared["difference"] == pytest.approx(means[1] - means[0]) and compared["n"] == 24
    alike = compare_runs(out / "plain-seed0", out / "joint-seed0")["overall"]
    single = [results["runs"][f"{a}-seed0"]["summary"]["overall_performance"] for a in ("plain", "joint")]
    assert alike.difference == pytest.approx(single[1] - single[0])
    assert "| joint | 2 |" in (out / "sweep.md").read_text() and (out / "sweep.png").stat().st_size > 5000
    alone = train_stream(make(tmp_path, sft={**world.SFT, "max_steps": 18}, output_dir=str(tmp_path / "alone")))
    assert alone.matrix.scores == last


def test_the_dry_run_is_what_will_be(tmp_path):
    plan = make(tmp_path, peft=LORA, sft={**world.SFT, "max_steps": -1, "num_train_epochs": 2})
    said = describe(prepare(*read_plan(plan)))
    (task,) = said["tasks"]
    assert (task["name"], task["parent"], task["rows"], task["test_rows"]) == ("joint", "base", 24, 24)
    assert said["between_tasks"] == "joint" and said["scored_rows"] == 2 * 24 and said["notes"] == []
    train_stream(plan)
    done = read_json(tmp_path / "out" / "task-00-joint" / "continual" / "trained.json")
    assert task["steps"] == done["steps"] == 12
    (note,) = describe(prepare(*read_plan(make(tmp_path))))["notes"]
    assert "the joint run has 6 steps in all" in note and "3 x 6 = 18" in note


def test_methods_that_need_no_earlier_task_work(tmp_path):
    general = str(tmp_path / "general.jsonl")
    methods = [
        {"replay": {"rows": general, "ratio": 0.3, "row_type": "text"}}, {"migu": {"first_task": True}},
        {"recadam": {"anneal": "none", "pull": 0.01}},
    ]  # fmt: skip
    result = train_stream(make(tmp_path, methods=methods, memory="forbidden"))
    facts = read_json(tmp_path / "out" / "task-00-joint" / "continual" / "trained.json")
    assert all(name in str(facts["methods"]) for name in ("replay", "migu", "recadam"))
    assert None not in result.matrix.scores[2]


def test_tasks_in_memory_and_one_task(tmp_path):
    plan = make(tmp_path)
    rows = [toy.rows("prompt_completion", number=8, seed=i) for i in range(2)]
    rest = {k: v for k, v in plan.items() if k not in ("tasks", "evaluation")}
    stream = TaskStream([Task(f"t{i}", train=r, test=r if i else None) for i, r in enumerate(rows)])
    result = train_stream(stream, **rest)
    assert result.results["tasks"] == ["t1"] and len(result.matrix.scores) == 1, "only scored tasks have a column"
    one = TaskStream([Task("t0", train=rows[0], test=rows[0])])
    joint = train_stream(one, **{**rest, "output_dir": str(tmp_path / "one")})
    plain = train_stream(one, **{**rest, "between_tasks": "continue", "output_dir": str(tmp_path / "plain")})
    assert joint.matrix == plain.matrix


REFUSED = {
    "memory": ({"memory": {"rows": 2}}, r"memory: memory keeps rows for later tasks.*memory: null"),
    "parent": ({"tasks.2.parent": "t0"}, r"tasks\[2\].parent: task 't2' continues from 't0'"),
    "base for all": ({"tasks.1.parent": "base"}, r"tasks\[1\].parent: .*without branches"),
    "sft": ({"tasks.1.sft": {"max_steps": 9}}, r"tasks\[1\].sft.max_steps: max_steps is 6 for task 't0' and 9 for 't1'"),
    "sft of the first": ({"tasks.0.sft": {"warmup_steps": 2}}, r"tasks\[0\].sft.warmup_steps: .* is 2 .* and not set for 't1'"),
    "methods": ({"tasks.1.methods": [{"freeze": {"bottom": 1}}]}, r"tasks\[1\].methods: methods of tasks differ: None for task 't0'"),
    "curve": ({"tasks.2.curve": [1]}, r"tasks\[2\].curve: curve of tasks differ: \[\] for task 't0', \[1\] for task 't2'"),
    "earlier rows": ({"methods": [{"replay": {"rows": "earlier_tasks", "ratio": 0.3}}]}, r"replay.rows: this asks for rows of earlier"),
    "kept rows": ({"methods": [{"kif": {"memory": "kept"}}]}, r"kif.memory: this asks for rows of earlier tasks"),
    "ewc": ({"methods": [{"ewc": {"weight": 1.0}}]}, r"methods: ewc works between tasks, and between_tasks: joint"),
    "o_lora": ({"methods": ["o_lora"]}, r"methods: o_lora works between tasks"),
    "tasl": ({"methods": ["tasl"]}, r"methods: tasl works between tasks"),
    "migu": ({"methods": ["migu"]}, r"methods: migu works between tasks"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_together_is_refused_before_training(tmp_path, case):
    changes, words = REFUSED[case]
    plan = make(tmp_path, peft=LORA)
    for path, value in changes.items():
        at, keys = plan, path.split(".")
        for key in keys[:-1]:
            at = at[int(key) if key.isdigit() else key]
        at[keys[-1]] = value
    file = world.write(tmp_path, plan)
    with pytest.raises(PlanError, match=words) as refused:
        train_stream(file)
    assert f"{file}, line " in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_the_advice_works(tmp_path):
    same = make(tmp_path)
    for task in same["tasks"]:
        task |= {"sft": {"max_steps": 2}, "methods": [], "curve": [1]}
    result = train_stream({**same, "output_dir": str(tmp_path / "same")})
    assert set(result.results["curves"]) == {"joint"} and set(result.results["curves"]["joint"]["1"]) == {
        "t0",
        "t1",
        "t2",
    }
    arm = {"between_tasks": "joint", "memory": None, "methods": []}
    plan = world.make(tmp_path, memory={"rows": 2}, methods=[{"ewc": {"weight": 1.0}}], sweep={"arms": {"joint": arm}})
    with pytest.raises(PlanError, match=r"memory: null"):
        read_plan({**plan, "sweep": {"arms": {"joint": {"between_tasks": "joint", "methods": []}}}})
    assert train_stream(plan).results["runs"]["joint-seed0"]["status"] == "MEASURED"


def test_rows_of_several_types_and_readers(tmp_path):
    plan = make(tmp_path)
    toy.rows("text", number=4, seed=1).to_json(tmp_path / "text.jsonl")
    plan["tasks"][1] |= {"train": str(tmp_path / "text.jsonl")}
    with pytest.raises(
        PlanError, match=r"between_tasks: task 't1' has rows with text and task 't0' has prompt, completion"
    ):
        prepare(*read_plan(plan))
    plan["tasks"][1]["columns"] = {"prompt": "w1", "completion": "{text}"}
    with pytest.raises(PlanError, match="column"):  # a column that is not there is still that task's mistake
        prepare(*read_plan(plan))
    plan["tasks"][1]["columns"] = {"prompt": "{text}", "completion": " {text}"}
    plan["tasks"][1]["test"] = None
    assert len(prepare(*read_plan(plan)).joint.train) == 8 + 4 + 8
    one, two = toy.rows("messages", number=3, seed=1).to_list(), toy.rows("messages", number=3, seed=2).to_list()
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    plan["tasks"] = [{"name": "a", "train": one}, {"name": "b", "train": [{**row, "tools": tools} for row in two]}]
    joined = prepare(*read_plan(plan)).joint.train
    assert len(joined) == 6 and joined[0]["tools"] is None and joined[5]["tools"]


def test_a_task_cannot_be_added(tmp_path):
    plan = make(tmp_path)
    train_stream({**plan, "tasks": plan["tasks"][:2]})
    with pytest.raises(PlanError, match=r"tasks\[2\]: added 't2'\n.*so no task can be added"):
        train_stream(plan)
    with pytest.raises(PlanError, match=r"between_tasks: 'joint' -> 'continue'"):
        train_stream({**plan, "tasks": plan["tasks"][:2], "between_tasks": "continue"})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_it_resumes(tmp_path, number):
    plan = make(tmp_path, methods=[{"recadam": {"anneal": "none", "pull": 0.01}}], peft=LORA)
    plan["sft"]["max_steps"] = 12
    assert forked.run(plan, tmp_path / "straight") == 0
    wanted = forked.outcome(tmp_path / "straight")

    def after_a_checkpoint():
        import os

        from hf_continual.trainer.trainer import ContinualTrainer

        save, calls = ContinualTrainer.save_model, []

        def dies(self, *args, **kwargs):
            save(self, *args, **kwargs)
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), number)

        ContinualTrainer.save_model = dies

    ended = forked.run(plan, tmp_path / "killed", hook=after_a_checkpoint)
    assert ended == (-number if number == signal.SIGKILL else forked.STOPPED)
    assert list((tmp_path / "killed" / "task-00-joint.partial").glob("checkpoint-*"))
    assert forked.run(plan, tmp_path / "killed") == 0
    assert forked.outcome(tmp_path / "killed") == wanted


def test_the_question_of_every_method():
    rows = toy.rows("prompt_completion", number=2)
    general = [
        Replay(rows=rows, ratio=0.1),
        GeRe(rows=toy.rows("text", number=2), per_batch=1),
        MIGU(first_task=True),
        RecAdam(),
        TaskVector(),
        KIF(memory=rows),
    ]
    assert not any(method.needs_earlier_task() for method in general)
    assert all(method.needs_earlier_task() for method in (EWC(), OLoRA(), TaSL(), MIGU()))
