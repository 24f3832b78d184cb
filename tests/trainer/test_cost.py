"""Time and tokens of a run, as its facts state them: all of it, or nothing."""

from __future__ import annotations

from hf_continual import ContinualConfig, ContinualTrainer, train_stream
from hf_continual.report.plan_runs import read_cost
from hf_continual.trainer.facts import run_facts
from tests import toy
from tests.stream import world


def trainer(folder):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    return ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(folder, **changes)), train_dataset=toy.rows(), processing_class=toy.tokenizer()
    )  # fmt: skip


def test_tokens_and_time_of_a_run_and_what_a_report_reads(tmp_path):
    run = trainer(tmp_path)
    run.train()
    facts = run_facts(run)
    logged = [e["num_tokens"] for e in run.state.log_history if "num_tokens" in e]
    assert facts.tokens == int(logged[-1]) > 0 and facts.seconds > 0 and facts.memory_bytes is None
    run.save_model()
    cost = read_cost("task", tmp_path)
    assert (cost["tokens"], cost["steps"], cost["seconds"]) == (facts.tokens, 4, facts.seconds)
    run.train()
    assert run_facts(run).tokens == facts.tokens, "a second training counts its own"


def test_a_report_reads_what_the_task_of_a_plan_took(tmp_path):
    result = train_stream({**(plan := world.make(tmp_path)), "tasks": plan["tasks"][:1]})
    (folder,) = result.output_dir.glob("task-00-*")
    cost = read_cost("t0", folder)
    assert cost["steps"] == 6 and cost["seconds"] > 0 and cost["tokens"] > 0
    (folder / "continual_config.json").unlink()
    assert read_cost("t0", folder) == {**cost, "device": None}


def test_a_resumed_run_does_not_pass_off_its_rest_as_the_whole(tmp_path):
    trainer(tmp_path).train()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    facts = run_facts(resumed)
    assert facts.steps == 4 and facts.seconds is None and facts.tokens is None
