"""train_stream: the matrix against the stored predictions, hand-over, merging, branches, changed and longer plans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_continual import AccuracyMatrix, Task, TaskStream, train_stream
from hf_continual.atomic_files import read_json, read_lines
from hf_continual.evaluation.exact_match import teacher_forced
from hf_continual.stream.models import load_for_training
from hf_continual.stream.plan_lines import PlanError
from hf_continual.stream.read_plan import read_plan
from hf_continual.trainer.adapters import kept_active
from tests import toy
from tests.stream import world

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
TEACH = {**world.SFT, "max_steps": 80, "learning_rate": 1e-2, "save_steps": 80}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run long enough to learn something and to forget it."""
    folder = tmp_path_factory.mktemp("taught")
    plan = world.make(folder, sft=TEACH)
    return plan, train_stream(plan), folder / "out"


def test_the_figures_are_those_of_the_stored_predictions(taught):
    _, result, out = taught
    stages = ["base", "task-00-t0", "task-01-t1", "task-02-t2"]
    cells = {}
    for i, stage in enumerate(stages, start=-1):
        for j in range(3):
            rows = read_lines(out / "predictions" / f"{stage}.t{j}.jsonl")
            assert [r["row_id"] for r in rows] == list(range(8)) and len({r["prompt_hash"] for r in rows}) == 8
            hits = [float(r["prediction"] == r["reference"].strip()) for r in rows]
            assert hits == [r["score"] for r in rows]
            cells[i, j] = sum(hits) / 8
    results = json.loads((out / "continual_results.json").read_text())
    scores = [[cells[i, j] for j in range(3)] for i in range(3)]
    base = [cells[-1, j] for j in range(3)]
    assert results["matrix"] == {"scores": scores, "base": base, "lower_is_better": False}
    assert (
        result.matrix == AccuracyMatrix(scores, base) and results["complete"] and results["tasks"] == ["t0", "t1", "t2"]
    )
    by_hand = {
        "overall_performance": sum(cells[2, j] for j in range(3)) / 3,
        "backward_transfer": sum(cells[2, j] - cells[j, j] for j in range(2)) / 2,
        "forward_transfer": sum(cells[j - 1, j] - cells[-1, j] for j in (1, 2)) / 2,
        "forgetting": sum(max(cells[i, j] for i in range(2)) - cells[2, j] for j in range(2)) / 2,
    }
    for name, value in by_hand.items():
        assert results["summary"][name] == pytest.approx(value)
        low, high = results["intervals"][name]
        assert low <= value <= high
    assert scores[0][0] > 0.3 and by_hand["forgetting"] > 0.3, "this world must show forgetting"
    losses = [sum(r["nll"] for r in read_lines(out / "predictions" / f"task-02-t2.t{j}.jsonl")) / 8 for j in range(3)]
    assert results["nll"]["scores"][2] == pytest.approx(losses) and results["nll"]["summary"]["backward_transfer"] < 0


def test_what_is_scored_is_what_was_saved(taught):
    _, result, out = taught
    model = AutoModelForCausalLM.from_pretrained(out / "task-02-t2")
    rows = toy.rows("prompt_completion", number=8, seed=2)
    assert teacher_forced(model, toy.tokenizer(), rows).score.value == result.matrix.scores[2][2]
    assert not list(out.rglob("training_args.bin"))


def test_a_finished_run_is_read_and_not_made_again(taught):
    plan, result, out = taught
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert train_stream(plan).matrix == result.matrix
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before


def test_tasks_may_be_added_and_nothing_else_changed(taught, tmp_path):
    plan, result, out = taught
    shorter = {**plan, "output_dir": str(tmp_path / "out"), "tasks": plan["tasks"][:2]}
    first = train_stream(shorter)
    assert [len(row) for row in first.matrix.scores] == [2, 2]
    longer = train_stream({**shorter, "tasks": plan["tasks"]})
    assert longer.matrix == result.matrix, "scores of the new task at earlier moments are made up for"
    assert torch.equal(world.weights(tmp_path / "out" / "task-02-t2"), world.weights(out / "task-02-t2"))
    with pytest.raises(PlanError) as refused:
        train_stream({**plan, "output_dir": str(tmp_path / "out"), "sft": {**TEACH, "learning_rate": 0.5}, "seed": 3})
    assert "seed: 0 -> 3" in str(refused.value) and "sft.learning_rate: 0.01 -> 0.5" in str(refused.value)
    changed = [{**plan["tasks"][0], "train": plan["tasks"][1]["train"]}, *plan["tasks"][1:]]
    with pytest.raises(PlanError, match=r"tasks\[0\].train.sha256"):
        train_stream({**plan, "output_dir": str(tmp_path / "out"), "tasks": changed})
    shown = {**TEACH, "logging_steps": 7, "logging_strategy": "steps"}
    assert train_stream({**plan, "output_dir": str(tmp_path / "out"), "sft": shown}).matrix == result.matrix
    with pytest.raises(PlanError, match=r"tasks\[1\]: 't1' -> removed"):
        train_stream({**plan, "output_dir": str(tmp_path / "out"), "tasks": plan["tasks"][:1]})


def test_a_folder_with_something_else_is_not_written_to(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(PlanError, match="is not empty, and it is not the folder of a plan's run"):
        train_stream(world.make(tmp_path))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"thesis.txt", ".lock"}


def test_one_process_at_a_time(tmp_path):
    from hf_continual.stream.plan_record import only_one

    with only_one(tmp_path / "out"), pytest.raises(PlanError, match="is being run by another process"):
        train_stream(world.make(tmp_path))


def test_tasks_in_memory(tmp_path):
    plan = world.make(tmp_path)
    rows = [toy.rows("prompt_completion", number=8, seed=i) for i in range(2)]
    stream = TaskStream([Task(f"t{i}", train=r, test=r) for i, r in enumerate(rows)])
    rest = {k: v for k, v in plan.items() if k not in ("tasks", "evaluation")}
    result = train_stream(stream, **rest)
    assert len(result.matrix.scores) == 2 and result.matrix.scores[0] == [result.matrix.scores[0][0], None]
    files = [{"name": f"t{i}", "train": r.to_list(), "test": r.to_list()} for i, r in enumerate(rows)]
    again = train_stream({**plan, "tasks": files, "output_dir": str(tmp_path / "lists"), "evaluation": {}})
    assert again.matrix == result.matrix


def test_adapters_are_continued(tmp_path):
    plan = world.make(tmp_path, peft=LORA)
    train_stream(plan)
    folders = [tmp_path / "out" / f"task-0{i}-t{i}" for i in range(3)]
    for folder in folders:
        tensors = world.adapter(folder)
        assert all(t.shape[0] == 4 for n, t in tensors.items() if "lora_A" in n)
        assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == plan["model"]
    assert any(not torch.equal(a, b) for a, b in zip(*(world.adapter(f).values() for f in folders[:2]), strict=True))


def test_a_new_adapter_leaves_the_earlier_ones_as_they_were(tmp_path):
    plan = world.make(tmp_path, peft=LORA, between_tasks="new_adapter", sft=TEACH)
    result = train_stream(plan)
    first, second, third = (world.adapter(tmp_path / "out" / f"task-0{i}-t{i}") for i in range(3))
    for name, tensor in first.items():
        axis, rank = (0, tensor.shape[0]) if "lora_A" in name else (1, tensor.shape[1])
        scale = 1.0 if "lora_A" in name else 2.0  # alpha / r goes into B
        for later, times in ((second, 2), (third, 3)):
            assert later[name].shape[axis] == times * rank == times * 4
        assert torch.equal(second[name].narrow(axis, 0, rank), scale * tensor)
        assert torch.equal(third[name].narrow(axis, 0, 2 * rank), second[name])
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(plan["model"]), tmp_path / "out" / "task-02-t2"
    )
    rows = toy.rows("prompt_completion", number=8, seed=2)
    assert teacher_forced(model, toy.tokenizer(), rows).nll.value == pytest.approx(
        result.results["nll"]["scores"][2][2]
    )


def test_the_earlier_adapter_acts_while_the_new_one_learns(tmp_path):
    plan = world.make(tmp_path, peft=LORA, between_tasks="new_adapter", tasks=world.make(tmp_path)["tasks"][:1])
    train_stream(plan)
    parent = tmp_path / "out" / "task-00-t0"
    read, _ = read_plan(plan)
    model, config = load_for_training(read, parent)
    assert config is None and [n for n, p in model.named_parameters() if p.requires_grad and ".earlier." in n] == []
    ids = torch.tensor([[5, 6, 7, 8]])
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(plan["model"]), parent)
    assert torch.allclose(model.eval()(input_ids=ids).logits, alone.eval()(input_ids=ids).logits, atol=1e-6)
    # What transformers does when it resumes from a checkpoint:
    with kept_active(model):
        model.set_adapter("default")
        assert not torch.allclose(model(input_ids=ids).logits, alone(input_ids=ids).logits, atol=1e-6)
    assert torch.allclose(model(input_ids=ids).logits, alone(input_ids=ids).logits, atol=1e-6)


def test_a_new_adapter_resumes_as_it_would_have_gone_on(tmp_path, monkeypatch):
    from hf_continual.trainer.trainer import ContinualTrainer

    plan = world.make(tmp_path, peft=LORA, between_tasks="new_adapter", tasks=world.make(tmp_path)["tasks"][:2])
    train_stream({**plan, "output_dir": str(tmp_path / "straight")})
    original, calls = ContinualTrainer.save_model, []

    def stops(self, *args, **kwargs):
        original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 7:  # four saves of the first task, three of the second: after its last checkpoint
            raise KeyboardInterrupt

    monkeypatch.setattr(ContinualTrainer, "save_model", stops)
    with pytest.raises(KeyboardInterrupt):
        train_stream(plan)
    monkeypatch.setattr(ContinualTrainer, "save_model", original)
    train_stream(plan)
    straight, resumed = (world.adapter(tmp_path / out / "task-01-t1") for out in ("straight", "out"))
    assert all(torch.equal(straight[n], resumed[n]) for n in straight)


def average(models, output_dir, base, share=0.5):
    """A merge: the weighted mean of full models."""
    Path(output_dir).mkdir()
    tensors = [load_file(Path(m) / "model.safetensors") for m in models]
    weights = [(1 - share) / max(len(models) - 1, 1)] * (len(models) - 1) + [share]
    mixed = {n: sum(w * t[n] for w, t in zip(weights, tensors, strict=True)) for n in tensors[0]}
    save_file(mixed, Path(output_dir) / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(Path(models[-1]) / "config.json", output_dir)
    assert base


@pytest.mark.parametrize("start", ["merged", "base"])
def test_merging_between_tasks(tmp_path, start):
    merge = {"function": "tests.stream.test_run:average", "start": start, "options": {"share": 0.25}}
    plan = world.make(tmp_path, between_tasks={"merge": merge})
    result = train_stream(plan)
    one, two = (tmp_path / "out" / f"task-0{i}-t{i}" for i in range(2))
    trained = [world.weights(f / "trained") for f in (one, two)]
    assert torch.equal(world.weights(one), trained[0])
    assert torch.allclose(world.weights(two), 0.75 * trained[0] + 0.25 * trained[1], atol=1e-7)
    scored = teacher_forced(
        AutoModelForCausalLM.from_pretrained(two), toy.tokenizer(), toy.rows("prompt_completion", number=8, seed=1)
    )
    assert result.results["nll"]["scores"][1][1] == pytest.approx(scored.nll.value)
    if start == "base":
        assert read_json(two / "continual" / "trained.json")["parent"] is None
        third = world.weights(tmp_path / "out" / "task-02-t2" / "trained")
        mixed = 0.375 * trained[0] + 0.375 * trained[1] + 0.25 * third
        assert torch.allclose(world.weights(tmp_path / "out" / "task-02-t2"), mixed, atol=1e-7)


def test_a_merge_that_does_not_exist_is_met_before_training(tmp_path):
    file = world.write(tmp_path, world.make(tmp_path, between_tasks={"merge": "tests.nowhere:average"}))
    with pytest.raises(
        PlanError, match=r"plan.yaml, line \d+, between_tasks.merge: the merge 'tests.nowhere:average' cannot"
    ):
        train_stream(file)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("checkpoint*"))


def test_branches_continue_from_their_parents(tmp_path):
    plan = world.make(tmp_path)
    plan["tasks"][2]["parent"] = "t0"
    plan["evaluation"]["tasks"] = "seen"
    result = train_stream(plan)
    assert result.results["tasks"] == ["t0", "t2"] and result.results["cells"]["t2"]["t1"]["status"] == "NOT_RUN"
    alone = train_stream(
        {**plan, "tasks": [plan["tasks"][0], {**plan["tasks"][2], "parent": None}], "output_dir": str(tmp_path / "b")}
    )
    assert torch.equal(world.weights(tmp_path / "out" / "task-02-t2"), world.weights(tmp_path / "b" / "task-01-t2"))
    assert alone.matrix == result.matrix


def test_curves_are_scored_while_training_and_change_nothing(tmp_path):
    plan = world.make(tmp_path)
    plan["tasks"][1]["curve"] = [0, 2, 6]
    result = train_stream(plan)
    curve = result.results["curves"]["t1"]
    assert list(curve) == ["0", "2", "6"] and curve["0"]["t0"]["nll"] == pytest.approx(
        result.results["nll"]["scores"][0][0]
    )
    assert curve["6"]["t1"]["nll"] == pytest.approx(result.results["nll"]["scores"][1][1])
    train_stream({**world.make(tmp_path), "output_dir": str(tmp_path / "plain")})
    assert torch.equal(world.weights(tmp_path / "out" / "task-02-t2"), world.weights(tmp_path / "plain" / "task-02-t2"))


def broken(model, tokenizer, rows):
    """A metric that fails."""
    raise ZeroDivisionError("nothing to divide by")


def test_an_evaluation_that_failed_is_an_error_and_is_measured_again(tmp_path, monkeypatch):
    plan = world.make(tmp_path)
    plan["evaluation"]["base"] = False
    plan["tasks"][1]["metric"] = "tests.stream.test_run:broken"
    with pytest.raises(
        RuntimeError, match=r"scoring 't1' with .*task-00-t0.partial failed: ZeroDivisionError: nothing"
    ):
        train_stream(plan)
    cells = read_json(tmp_path / "out" / "task-00-t0.partial" / "continual" / "scores.json")
    assert (
        cells["t0"]["status"] == "MEASURED" and cells["t1"]["status"] == "ERROR" and "nothing" in cells["t1"]["error"]
    )
    monkeypatch.setitem(globals(), "broken", lambda model, tokenizer, rows: [0.5] * len(rows))
    result = train_stream(plan)
    assert result.matrix.scores[2][1] == 0.5 and result.results["cells"]["t0"]["t1"]["status"] == "MEASURED"


def test_a_task_that_the_base_can_do_is_refused(taught, tmp_path):
    _, _, out = taught
    plan = world.make(tmp_path, model=str(out / "task-00-t0"))
    score = plan["evaluation"]["solved_at"] = 0.3
    file = world.write(tmp_path, plan)
    with pytest.raises(
        PlanError, match=r"plan.yaml, line \d+, tasks\[0\]: the base model scores .* drift, not forgetting"
    ):
        train_stream(file)
    assert not list((tmp_path / "out").glob("task-*")) and score
    plan["evaluation"]["solved_at"] = None
    assert len(train_stream(world.write(tmp_path, plan)).matrix.scores) == 3


def test_earlier_tasks_are_replayed(tmp_path):
    methods = {"replay": {"rows": {"earlier_tasks": 3}, "ratio": 0.3}}
    plan = world.make(tmp_path, methods=methods)
    from hf_continual.stream.prepare import prepare

    prepared = prepare(*read_plan(plan))
    assert prepared.methods(prepared.stream[0]) == []
    (second,), (third,) = (prepared.methods(prepared.stream[i]) for i in (1, 2))
    assert len(second.rows) == 3 and len(third.rows) == 6
    assert set(second.rows["prompt"]) <= set(prepared.stream[0].train["prompt"])
    train_stream(plan)
    plain = world.make(tmp_path / "plain")
    train_stream(plain)
    same = [
        torch.equal(world.weights(tmp_path / "out" / f), world.weights(tmp_path / "plain" / "out" / f))
        for f in ("task-00-t0", "task-01-t1")
    ]
    assert same == [True, False]
    plan["tasks"][0] = {**plan["tasks"][0], "train": str(tmp_path / "general.jsonl")}
    with pytest.raises(PlanError, match=r"methods: the rows of the earlier task 't0' have the columns \['text'\]"):
        prepare(*read_plan(plan))
