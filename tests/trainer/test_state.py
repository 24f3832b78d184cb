"""The methods' state in a checkpoint, and which checkpoints are complete."""

from __future__ import annotations

import json

import pytest
import torch

from hf_continual.trainer.state import (
    check_same_methods,
    is_complete,
    last_complete_checkpoint,
    read_run,
    read_state,
    write_state,
)

NOW = [{"freeze": {"bottom": 1, "embeddings": True}}]


def test_state_round_trip(tmp_path):
    tensors = {"importance": torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(), "round": 3, "note": "x"}
    write_state(tmp_path, {"methods": NOW, "replay": None}, {"kif": tensors, "freeze": {}})
    back = read_state(tmp_path, "kif")
    assert torch.equal(back["importance"], tensors["importance"]) and back["round"] == 3
    assert read_state(tmp_path, "freeze") == {}
    assert read_run(tmp_path)["methods"] == NOW
    assert read_run(tmp_path / "elsewhere") is None


def test_other_methods_are_refused_with_the_difference(tmp_path):
    write_state(tmp_path, {"methods": NOW, "replay": None}, {})
    check_same_methods(tmp_path, NOW)
    with pytest.raises(ValueError, match="freeze.bottom was 1, is 2"):
        check_same_methods(tmp_path, [{"freeze": {"bottom": 2, "embeddings": True}}])
    with pytest.raises(ValueError, match=r"\['freeze'\] then, none now"):
        check_same_methods(tmp_path, [])
    with pytest.raises(ValueError, match=r"plain was written without methods .*\['freeze'\]"):
        check_same_methods(tmp_path / "plain", NOW)
    write_state(tmp_path, {"methods": [{"replay": {"rows": "/a/old.jsonl", "ratio": 0.1}}], "replay": []}, {})
    moved = [{"replay": {"rows": "/b/old.jsonl", "ratio": 0.1}}]
    check_same_methods(tmp_path, moved, {"replay": ["rows"]})
    with pytest.raises(ValueError, match=r"replay.rows was '/a/old.jsonl', is '/b/old.jsonl'"):
        check_same_methods(tmp_path, moved)


def test_a_checkpoint_killed_while_written_is_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path / "none") is None
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-15" / "trainer_state.json").write_text('{"global_step": 1')
    assert not is_complete(tmp_path / "checkpoint-15")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
