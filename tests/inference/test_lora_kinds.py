"""Plans, scores, cards and merges of MoELoRA and SAPT-LoRA: what is not a plain checkpoint is known everywhere."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_continual import load_moe_lora, load_sapt_lora, merge, train_stream
from hf_continual.evaluation.exact_match import teacher_forced
from hf_continual.inference.kinds import for_task
from hf_continual.merging.errors import MergeError
from hf_continual.stream.plan import ModelPlan
from hf_continual.stream.score_model import score_model
from tests import toy
from tests.stream import world

METHODS = {
    "moe_lora": {"experts": 2, "r": 4, "task_size": 8},
    "sapt_lora": {"r": 2, "hidden": 6, "kept": 4, "weight": 0.5},
}
LOADERS = {"moe_lora": load_moe_lora, "sapt_lora": load_sapt_lora}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The result of a plan of three tasks, by method; run once."""
    found = {}

    def run(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            plan = world.make(folder, methods=[{name: METHODS[name]}])
            found[name] = folder, train_stream(world.write(folder, plan))
        return found[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_plan_trains_hands_over_and_scores(ran, name):
    folder, result = ran(name)
    matrix = result.matrix.scores
    assert len(matrix) == 3 and all(row[i] is not None for i, row in enumerate(matrix))
    last = folder / "out" / "task-02-t2"
    assert json.loads((last / "adapter_config.json").read_text())["tasks"] == ["t0", "t1", "t2"]
    tensors = load_file(last / "adapter_model.safetensors")
    assert len([n for n in tensors if n.endswith(("q_proj.lora_gate.default.embeddings.2", "keys.2"))]) >= 1
    rows = toy.rows("prompt_completion", number=8, seed=1)
    model = LOADERS[name](last, AutoModelForCausalLM.from_pretrained(folder / "model"))
    with for_task(model, "t1"):
        scored = teacher_forced(model, toy.tokenizer(), rows, batch_size=8)
    assert scored.score.value == pytest.approx(matrix[2][1])
    lines = [json.loads(line) for line in next((folder / "out").rglob("*t1*.jsonl")).read_text().splitlines()]
    assert len(lines) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_cards_scores_and_merges_know_it(ran, name, tmp_path):
    folder, _ = ran(name)
    last = folder / "out" / "task-02-t2"
    card = (last / "README.md").read_text()
    assert f"from hf_continual import load_{name}" in card and "mixture of LoRA" in card
    found = score_model(ModelPlan(path=str(last)), str(folder / "t2.jsonl"), "teacher_forced", "train", None, 8, None)
    assert found["n"] == 8
    other = str(folder / "out" / "task-01-t1")
    with pytest.raises(MergeError, match="cannot be merged, and nothing can be merged on top of it"):
        merge("linear", [str(last), other], str(tmp_path / "merged"), base=str(folder / "model"))


def test_the_gate_of_each_task_scores_it(tmp_path):
    """The scores of a plan are those with the task's own gate: another gate gives other ones."""
    plan = world.make(tmp_path, methods=[{"moe_lora": METHODS["moe_lora"]}])
    plan["tasks"] = plan["tasks"][:2]
    plan["sft"]["max_steps"] = 12
    plan["tasks"][1]["curve"] = [6]  # scored in the middle: the training goes on with its own gate
    train_stream(world.write(tmp_path, plan))
    del plan["tasks"][1]["curve"]
    plan["output_dir"] = str(tmp_path / "again")
    train_stream(world.write(tmp_path, plan))
    one, other = (load_file(tmp_path / out / "task-01-t1" / "adapter_model.safetensors") for out in ("out", "again"))
    assert all(torch.equal(t, other[n]) for n, t in one.items())
    model = load_moe_lora(tmp_path / "out" / "task-01-t1", AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = []
    for name in ("t0", "t1"):
        with for_task(model, name):
            logits.append(model(ids).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-5
