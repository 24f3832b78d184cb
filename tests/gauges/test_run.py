"""Gauges and rules in a run: weights are untouched, kills and two processes change nothing, rules act and say why."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig

from hf_continual import EWC, ContinualConfig, ContinualTrainer, GeRe, RecAdam, Replay
from tests import toy

GENERAL = {"general": toy.rows("text", number=6, seed=9)}
# At a rate of 0.05 the loss of general text rises by 0.2 nats and more at steps 6 and 7 of 12.
WORSE = {"gauge": "general/loss_change", "above": 0.2, "for": 2, "noise": 0}
FORGETS = {"gauges": {**GENERAL, "every": 1}, "max_steps": 12, "learning_rate": 5e-2}


def trainer(folder, methods=None, peft=False, **settings):
    changes = {"max_steps": 6, "learning_rate": 3e-2, **settings}
    return ContinualTrainer(
        toy.model(),
        ContinualConfig(**toy.settings(folder, **changes)),
        train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if peft else None,
        methods=methods,
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "continual" / "gauges.jsonl").read_text().splitlines()]


def gauged(trainer):
    return [
        {k: v for k, v in e.items() if "gauge" in k or k == "step"}
        for e in trainer.state.log_history
        if any("gauge" in k for k in e)
    ]


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("methods", [None, "some"])
def test_weights_are_those_without_gauges(tmp_path, peft, methods):
    def made():
        return methods and [Replay(toy.rows(seed=9), ratio=0.3), EWC(rows=4)]

    plain = trainer(tmp_path / "plain", made(), peft, gauges=False)
    plain.train()
    watched = trainer(tmp_path / "watched", made(), peft, gauges={**GENERAL, "task": {}, "every": 2})
    watched.train()
    assert torch.equal(toy.flat(plain.model), toy.flat(watched.model))
    assert [e["step"] for e in gauged(watched)] == [0, 2, 4, 6]
    first, last = gauged(watched)[0], gauged(watched)[-1]
    assert first["gauge/task/kl"] == pytest.approx(0, abs=1e-6) and last["gauge/task/kl"] > 1e-4
    assert last["gauge/task/loss"] < first["gauge/task/loss"] and last["gauge/task/loss_se"] > 0
    own = [e for e in toy.logs(watched) if not any("gauge" in k for k in e)]
    assert [e.keys() for e in own] == [e.keys() for e in toy.logs(plain)], "the other logs are as they were"
    written = [e for e in lines(tmp_path / "watched") if e["gauge"] == "task/kl"]
    assert [e["step"] for e in written] == [0, 2, 4, 6] and written[-1]["value"] == last["gauge/task/kl"]
    assert watched.methods.describe() == plain.methods.describe()


def test_one_forward_per_row_and_none_between(tmp_path):
    run = trainer(tmp_path, gauges={**GENERAL, "every": 3, "batch_size": 1}, max_steps=6)
    calls = []
    run.model.register_forward_hook(lambda module, *_: calls.append(module.training))
    run.train()
    assert calls.count(True) == 6 and calls.count(False) == 6 * 3, "6 rows before the first step, at steps 3 and 6"


@pytest.mark.parametrize("kill_at", [3, 6])
def test_resumed_is_uninterrupted(tmp_path, kill_at):
    options = {**FORGETS, "rollback_if": WORSE, "save_strategy": "steps", "save_steps": 1}
    straight = trainer(tmp_path / "a", **options)
    straight.train()
    assert straight.ended is not None and "back to the weights of step" in straight.ended
    stopped = straight.state.global_step
    assert not (tmp_path / "a" / f"checkpoint-{stopped}").exists(), "it would be trained further"
    resumed = trainer(tmp_path / "a", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{kill_at}"))
    assert resumed.ended == straight.ended and torch.equal(toy.flat(straight.model), toy.flat(resumed.model))
    assert gauged(resumed)[-1] == gauged(straight)[-1]


def test_a_resumed_run_remembers_what_methods_measure_of_themselves(tmp_path):
    def made():
        return trainer(
            tmp_path, [RecAdam(anneal="none", pull=0.01)], gauges={**GENERAL, "every": 1}, save_strategy="steps", save_steps=2
        )  # fmt: skip

    made().train()
    straight = lines(tmp_path)
    assert {e["gauge"] for e in straight} >= {"recadam/distance", "general/loss"}
    made().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert lines(tmp_path) == straight and [e["step"] for e in straight if e["gauge"] == "general/loss"] == [*range(7)]


def test_a_pull_owed_to_weights_that_are_gone_is_dropped(tmp_path):
    method = RecAdam(anneal="none", pull=0.01, pull_every=100)
    run = trainer(tmp_path, [method], **FORGETS, rollback_if=WORSE)
    owed = []
    replaced = method.weights_replaced

    def watched(run):
        owed.append([float(state["owed"]) for state in run.optimizer.state.values()])
        replaced(run)
        owed.append([float(state["owed"]) for state in run.optimizer.state.values()])

    method.weights_replaced = watched
    run.train()
    before, after = owed
    assert min(before) > 0 and not any(after)
    kept = next(m for m in run.methods if m.watches)._kept
    assert all(torch.equal(p.detach(), kept[n]) for n, p in run.run.named_parameters().items())


def test_rolled_back_weights_are_those_of_that_step(tmp_path):
    run = trainer(tmp_path / "a", **FORGETS, rollback_if=WORSE)
    run.train()
    event = lines(tmp_path / "a")[-1]
    assert (
        event["event"] == "rollback"
        and event["rule"] == "general/loss_change > 0.2 for 2"
        and event["reason"] in run.ended
    )
    passed = [e for e in gauged(run) if e["gauge/general/loss_change"] <= 0.2]
    again = trainer(tmp_path / "b", max_steps=12, learning_rate=5e-2, save_strategy="steps", save_steps=1)
    again.train()
    step = passed[-1]["step"]
    assert 0 < step < event["step"]
    want = type(toy.model()).from_pretrained(tmp_path / "b" / f"checkpoint-{step}")
    assert torch.equal(toy.flat(run.model), toy.flat(want))
    run.save_model()
    kept = type(toy.model()).from_pretrained(tmp_path / "a")
    assert torch.equal(toy.flat(kept), toy.flat(want))
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "rollback at step" in card and "general/loss_change" in card


def test_stop_if_stops_within_one_evaluation_of_crossing(tmp_path):
    run = trainer(
        tmp_path, gauges={**GENERAL, "every": 1}, max_steps=20, learning_rate=0.1,
        stop_if="general/loss_change > 0.1 for 1",
    )  # fmt: skip
    run.train()
    seen = gauged(run)
    crossed = next(
        e["step"] for e in seen if e["gauge/general/loss_change"] - 2 * e["gauge/general/loss_change_se"] > 0.1
    )
    assert run.state.global_step == crossed < 20 and "stopped at step" in run.ended


def test_keep_best_ends_with_the_best(tmp_path):
    run = trainer(
        tmp_path, gauges={**GENERAL, "task": {}, "every": 1}, max_steps=9, learning_rate=5e-2,
        keep_best={"task/loss": 1, "general/loss": 6},
    )  # fmt: skip
    run.train()
    sums = {e["step"]: e["gauge/task/loss"] + 6 * e["gauge/general/loss"] for e in gauged(run)}
    best = min(sums, key=sums.get)
    assert best not in (0, 9), "the world is made so that the best is in the middle"
    event = lines(tmp_path)[-1]
    assert event["event"] == "keep_best" and f"after step {best}" in event["reason"]
    assert run.ended is None, "keeping the best is not ending early"


def test_a_saturated_task_ends(tmp_path):
    run = trainer(
        tmp_path,
        gauges={"every": 25, "task": {"kl": False}},
        max_steps=600,
        learning_rate=1e-2,
        stop_when="task saturated",
    )
    run.train()
    assert run.state.global_step < 600 and "less than 2 % of the" in run.ended
    assert gauged(run)[-1]["gauge/task/loss"] < 0.3 * gauged(run)[0]["gauge/task/loss"]


def test_general_text_of_gere_and_replay_is_a_gauge_by_default(tmp_path):
    rows = toy.rows(seed=14, low=20, high=50)
    for method in (Replay(rows, ratio=0.2, name="general"), GeRe(rows, ratio=0.1, cache_dir=str(tmp_path / "cache"))):
        run = trainer(tmp_path / method.name, [method])
        run.train()
        assert [e["step"] for e in gauged(run)] == [0, 6] and gauged(run)[-1]["gauge/general/loss"] > 0
    off = trainer(tmp_path / "off", [Replay(rows, ratio=0.2, name="general")], gauges=False)
    off.train()
    assert not gauged(off) and not (tmp_path / "off" / "continual" / "gauges.jsonl").exists()


def test_distances_to_anchors_are_measured(tmp_path):
    start = toy.flat(toy.model())
    run = trainer(tmp_path, [RecAdam(anneal="none", pull=0.01)], gauges={**GENERAL, "every": 3})
    run.train()
    far = {e["step"]: e["gauge/recadam/distance"] for e in gauged(run)}
    assert far[0] == 0 and far[6] == pytest.approx(float((toy.flat(run.model) - start).norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop_if": "general/loss > 1"}, "stop_if=...\\) is a rule on gauges, and there are none"),
        ({"gauges": GENERAL, "stop_if": "old/loss > 1"}, "stop_if names 'old/loss', which is not measured. Measured are general/loss"),
        ({"gauges": GENERAL, "stop_if": "general/kl > 1"}, "stop_if names 'general/kl', which is not measured"),
        ({"gauges": {"general": {"limit": 3}}}, "gauge 'general' has no rows"),
        ({"gauges": {"general": {"row": "x"}}}, "unknown key 'row'. Did you mean 'rows'"),
        ({"gauges": {"a/b": "x.jsonl"}}, "'a/b'.*must not be empty or contain '/'"),
        ({"gauges": {**GENERAL, "every": 0}}, "every=0\\) must be at least 1"),
        ({"gauges": GENERAL, "stop_when": "bored"}, "stop_when='bored'\\) must be 'task saturated' or None"),
        ({"gauges": GENERAL, "rollback_if": "general/loss > 1", "keep_best": "general/loss"}, "rollback_if and keep_best both choose"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_a_model_is_loaded(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        ContinualConfig(**toy.settings(tmp_path, **options))


def test_a_command_line_describes_gauges(tmp_path):
    from transformers import HfArgumentParser

    text = '{"general": "general.jsonl", "every": 5}'
    words = [
        "--output_dir",
        str(tmp_path),
        "--gauges",
        text,
        "--stop_if",
        "general/loss > 3",
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    ]
    (config,) = HfArgumentParser(ContinualConfig).parse_args_into_dataclasses(words)
    assert config.gauges == {"general": "general.jsonl", "every": 5} and config.stop_if == "general/loss > 3"
    with_rows = ContinualConfig(**toy.settings(tmp_path, gauges=GENERAL))
    assert json.loads(with_rows.to_json_string())["gauges"] == {"general": "6 rows"}


def test_a_plan_measures_the_tests_of_earlier_tasks(tmp_path):
    """The first task has no earlier one: its gauge, and the rule on it, are left out. Scores are those of the plan."""
    from hf_continual import train_stream
    from tests.stream import world

    plan = world.make(tmp_path)
    plan["sft"] |= {"gauges": {"old": "earlier_tests", "every": 3}, "stop_if": "old/loss_ratio > 100 for 1"}
    result = train_stream(plan).results
    folder = tmp_path / "out"
    assert not (folder / "task-00-t0" / "continual" / "gauges.jsonl").exists()
    last = [e for e in lines(folder / "task-01-t1") if e["step"] == 6]
    exact = next(e["value"] for e in last if e["gauge"] == "old/exact")
    loss = next(e["value"] for e in last if e["gauge"] == "old/loss")
    assert exact == pytest.approx(result["matrix"]["scores"][1][0])
    assert loss == pytest.approx(result["nll"]["scores"][1][0], abs=1e-5)
    both = {e["gauge"]: e["value"] for e in lines(folder / "task-02-t2") if e["step"] == 6}
    assert both["old/loss"] == pytest.approx(sum(result["nll"]["scores"][2][:2]) / 2, abs=1e-5)


def test_an_earlier_adapter_stays_frozen_while_the_base_is_recorded(tmp_path):
    """PEFT makes every active adapter trainable when adapters are switched on again; here one must not move."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    toy.model().save_pretrained(tmp_path / "base")

    def run(folder, model, **settings):
        made = ContinualTrainer(
            str(model), ContinualConfig(**toy.settings(tmp_path / folder, max_steps=4, learning_rate=3e-2, **settings)),
            train_dataset=toy.rows(), processing_class=toy.tokenizer(), peft_config=lora,
        )  # fmt: skip
        before = {n: p.requires_grad for n, p in made.model.named_parameters()}
        made.train()
        assert {n: p.requires_grad for n, p in made.model.named_parameters()} == before
        return made

    run("first", tmp_path / "base").save_model()
    plain = run("plain", tmp_path / "first", gauges=False)
    watched = run("watched", tmp_path / "first", gauges={"task": {"kl": True}, "every": 2})
    assert len({n.split(".")[-2] for n, _ in watched.model.named_parameters() if "lora_A" in n}) == 2, (
        "one on the other"
    )
    assert torch.equal(toy.flat(plain.model), toy.flat(watched.model))
    assert gauged(watched)[0]["gauge/task/kl"] > 0, "the base is the model without the earlier adapter too"


def test_a_gauge_that_a_checkpoint_does_not_know_says_where_its_changes_begin(tmp_path, caplog):
    rows = toy.rows(seed=14, low=20, high=50)
    saved = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, [Replay(rows, ratio=0.2, name="general")], gauges=False, **saved).train()
    resumed = trainer(tmp_path, [Replay(rows, ratio=0.2, name="general")], **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "'general' was not measured before the first step: its changes are those since step 3" in caplog.text
    assert gauged(resumed)[-1]["step"] == 6
