"""The accuracy matrix in the loggers of a plan, read back from what each of them wrote."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from trl import SFTConfig

from hf_continual import ContinualTrainer, FreezeLayers, RecAdam, train_stream
from hf_continual.stream import trackers
from tests import toy
from tests.stream import world

RESULTS = {
    "tasks": ["law", "a|b"],
    "between_tasks": "continue",
    "matrix": {"scores": [[0.75, 0.25], [0.5, 1.0]], "base": [0.125, 0.25], "lower_is_better": False},
    "summary": {"overall_performance": 0.75, "forward_transfer": None, "per_task_minimum": [0.5, 1.0]},
    "gauges": {"general text": {"after": {"law": {"value": 3.0}, "a|b": {"value": 3.5}}}},
}
LAST = {
    "continual/score/law": 0.5, "continual/score/a|b": 1.0, "continual/gauge/general text": 3.5,
    "continual/overall_performance": 0.75,
}  # fmt: skip


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Trackers that reach no server and write into a folder of the test."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path


def tensorboard_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    found.Reload()
    return found


def test_tensorboard_holds_scores_matrix_and_picture(tmp_path):
    first = {**RESULTS, "matrix": {**RESULTS["matrix"], "scores": [[0.75, 0.25]]}, "gauges": {}}
    trackers.log_matrix(first, tmp_path, {"report_to": "tensorboard"})
    trackers.log_matrix(RESULTS, tmp_path, {"report_to": ["tensorboard"]})
    found = tensorboard_of(tmp_path / "runs" / "matrix")
    assert [(e.step, e.value) for e in found.Scalars("continual/score/law")] == [(1, 0.75), (2, 0.5)]
    assert {key: found.Scalars(key)[-1].value for key in LAST} == LAST
    assert set(found.Tags()["scalars"]) == set(LAST)
    (image,) = found.Images("continual/matrix")[-1:]
    assert image.width > 200 and image.encoded_image_string.startswith(b"\x89PNG") and image.step == 2
    text = found.Tensors("continual/matrix/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| (base model) | 0.125 | 0.250 |" in text and "| law | 0.750 | 0.250 |" in text and "a\\|b" in text


def test_wandb_holds_them_too(offline):
    wandb = pytest.importorskip("wandb")
    trackers.log_matrix(RESULTS, offline, {"report_to": "wandb", "run_name": "mine"})
    run = wandb.run
    summary = dict(run.summary)
    files = {name: os.path.join(root, name) for root, _, names in os.walk(run.dir) for name in names}
    wandb.finish()
    assert run.name == "mine" and {key: summary[key] for key in LAST} == LAST and summary["continual/tasks"] == 2
    (table,) = [json.loads(Path(path).read_text()) for name, path in files.items() if name.endswith(".table.json")]
    assert table["columns"] == ["after learning", "law", "a|b"]
    assert table["data"] == [["(base model)", 0.125, 0.25], ["law", 0.75, 0.25], ["a|b", 0.5, 1.0]]
    assert any(name.endswith(".png") for name in files)


def test_each_run_of_a_sweep_has_its_own_run_in_wandb(offline):
    wandb = pytest.importorskip("wandb")
    with trackers.own_run():
        trackers.log_matrix(RESULTS, offline, {"report_to": "wandb", "run_name": "first"})
        assert wandb.run.name == "first"
    assert wandb.run is None
    mine = wandb.init(project="mine")
    with trackers.own_run():
        trackers.log_matrix(RESULTS, offline, {"report_to": "wandb"})
    assert wandb.run is mine, "the caller's own run stays"
    wandb.finish()


def test_trackio_holds_them_too(offline):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    trackers.log_matrix(RESULTS, offline, {"report_to": "trackio", "run_name": "mine", "project": "kept"})
    (line,) = [row for row in SQLiteStorage.get_logs("kept", "mine-matrix") if "continual/matrix" in row]
    assert {key: line[key] for key in LAST} == LAST and line["step"] == 2
    assert line["continual/matrix"]["_value"][1] == {"after learning": "law", "law": 0.75, "a|b": 0.25}
    assert line["continual/matrix_picture"]["_type"] == "trackio.image"


def test_a_plan_logs_once_per_task_and_trainers_log_their_gauges(tmp_path):
    plan = world.make(tmp_path)
    plan["sft"] |= {
        "report_to": "tensorboard",
        "gauges": {"general": {"rows": str(tmp_path / "general.jsonl"), "limit": 4}, "every": 3},
    }
    plan["tasks"] = plan["tasks"][:2]
    result = train_stream(plan)
    again = train_stream(plan)
    assert again.matrix == result.matrix
    out = tmp_path / "out"
    found = tensorboard_of(out / "runs" / "matrix")
    assert [e.step for e in found.Scalars("continual/score/t0")] == [1, 2], "the second call had nothing new to log"
    want = [row[0] for row in result.matrix.scores]
    assert [e.value for e in found.Scalars("continual/score/t0")] == pytest.approx(want)
    assert found.Scalars("continual/overall_performance")[-1].value == pytest.approx(result.matrix.overall_performance)
    own = next(p.parent for p in (out / "task-01-t1").rglob("events.out*"))
    gauge = tensorboard_of(own).Scalars("train/gauge/general/loss")
    assert [e.step for e in gauge] == [0, 3, 6]


def test_what_methods_say_of_themselves_is_read_back(tmp_path):
    settings = toy.settings(tmp_path, max_steps=4, logging_steps=2) | {"report_to": "tensorboard"}
    methods = [FreezeLayers(bottom=1), RecAdam(anneal="none", pull=0.01)]
    trainer = ContinualTrainer(
        toy.model(), SFTConfig(**settings), train_dataset=toy.rows(), processing_class=toy.tokenizer(), methods=methods
    )
    trainer.train()
    found = tensorboard_of(next(tmp_path.rglob("events.out*")).parent)
    for name in ("recadam/distance", "recadam/pull", "freeze/trainable"):
        logged = {e["step"]: e[name] for e in trainer.state.log_history if name in e}
        written = {e.step: e.value for e in found.Scalars(f"train/{name}")}
        assert list(written) == [2, 4] and written == pytest.approx(logged)
    assert 0 < logged[2] < 1


def test_a_logger_that_fails_is_a_warning(tmp_path, caplog):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "hf_continual"):
        trackers.log_matrix(RESULTS, tmp_path, {"report_to": "tensorboard"})
    assert "could not be logged to tensorboard: " in caplog.text


@pytest.mark.parametrize("report_to", [None, "none", "mlflow", []])
def test_others_get_nothing(tmp_path, report_to):
    trackers.log_matrix(RESULTS, tmp_path, {"report_to": report_to})
    assert not list(tmp_path.iterdir())
