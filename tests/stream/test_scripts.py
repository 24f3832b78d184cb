"""A plan is three scripts: the same tasks trained one by one from the folders before give the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig

from hf_continual import EWC, KIF, ContinualConfig, ContinualTrainer, GeRe, OLoRA, train_stream
from hf_continual.atomic_files import read_lines
from hf_continual.data.handover import read, state_of
from hf_continual.data.rows import load_rows
from tests.stream import forked, world
from tests.trainer.same import same


def kept(folder: Path):
    """The rows that a task's buffer keeps, without their origin."""
    return [
        {"prompt": row["prompt"], "completion": row["completion"]}
        for row in read_lines(folder / "continual" / "memory.jsonl")
    ]


@pytest.mark.slow
def test_three_scripts(tmp_path):
    plan = forked.handing_over(tmp_path)
    plan["methods"][0]["gere"]["cache_dir"] = str(tmp_path / "states")
    train_stream(plan)
    folder = tmp_path / "model"
    for i in range(3):
        methods = [
            GeRe(str(tmp_path / "general.jsonl"), per_batch=1, weight="dynamic", cache_dir=str(tmp_path / "other")),
            EWC(weight=10.0),
            OLoRA(),
        ]
        if i:
            memory = kept(tmp_path / "out" / f"task-0{i - 1}-t{i - 1}")
            methods.append(KIF(memory=memory, inner_steps=3, outer_steps=1))
        trainer = ContinualTrainer(
            str(folder),
            ContinualConfig(str(tmp_path / f"script-{i}"), task_name=f"t{i}", task_index=i, seed=0, **world.SFT),
            train_dataset=load_rows(str(tmp_path / f"t{i}.jsonl")),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **plan["peft"]),
            methods=methods,
        )
        trainer.train()
        folder = tmp_path / f"script-{i}"
        trainer.save_model()
        here, there = (world.adapter(f) for f in (folder, tmp_path / "out" / f"task-0{i}-t{i}"))
        assert same(here, there), f"task {i}"
        mine, theirs = read(folder), read(tmp_path / "out" / f"task-0{i}-t{i}")
        assert mine.names == theirs.names and {"ewc", "o_lora"} <= set(mine.names)
        assert all(same(state_of(mine, n), state_of(theirs, n)) for n in mine.names)
