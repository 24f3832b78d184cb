"""On-policy replay: what is asked, answered, chosen and handed over, worked by hand; and that it keeps the first task."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy

from hf_continual import ContinualConfig, ContinualTrainer, OnPolicyReplay, train_stream
from hf_continual.data import handover, sampling
from hf_continual.data.answered_rows import Asked, asked_of, packed_rows, unpacked_rows
from hf_continual.data.sampling import Answer, Sampling
from hf_continual.hub.contents import collect
from hf_continual.hub.folder_facts import read_facts
from hf_continual.methods import pseudo_samples
from hf_continual.methods.on_policy_replay import answers as written_answers
from hf_continual.methods.on_policy_replay import best
from hf_continual.methods.on_policy_replay.answers import Counts, choose, write_answers
from tests import toy
from tests.stream import world

ZERO_TOLERANCE = 0.0
NEEDS_PREDECESSOR = True
EXTRA_FORWARDS = 12  # two batches of answers of six tokens each
NAME = "on_policy_replay"
ENDS = frozenset({1})


def example(world):
    return OnPolicyReplay(share=0.25, ratio=0.15, max_new_tokens=6, batch_rows=6, temperature=1.0)


def zero(world):
    return OnPolicyReplay(share=0, ratio=0)


def pairs(low, number=6):
    """Questions of two words with an answer of one, the words from `low` on."""
    return Dataset.from_list(
        [{"prompt": f"w{low + i} w{low + i + 1}", "completion": f" w{low + i}"} for i in range(number)]
    )


def build(start, folder, rows, *methods, peft=None, **settings):
    return ContinualTrainer(
        start, ContinualConfig(**toy.settings(folder, **settings)), train_dataset=rows, processing_class=toy.tokenizer(),
        peft_config=peft, methods=list(methods),
    )  # fmt: skip


KNOWS = {"max_steps": 100, "learning_rate": 5e-3, "per_device_train_batch_size": 6, "logging_steps": 200}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Folder of a model that knows six questions, and left its own answers to them."""
    folder = tmp_path_factory.mktemp("first")
    trainer = build(toy.model(), folder, pairs(0), OnPolicyReplay(share=0.5, temperature=0), task_name="first", **KNOWS)
    trainer.train()
    trainer.save_model()
    return folder


def test_the_best_by_hand():
    nan = math.nan
    assert best(torch.tensor([0.1, nan, 0.9, 0.5]), torch.tensor([-1.0, 0.0, -2.0, -3.0]), 2) == [2, 3]
    assert best(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-2.0, -1.0, -1.0]), 2) == [1, 2]  # the likelier of equals
    assert best(torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -1.0]), 1) == [0]  # then the earlier
    assert best(torch.tensor([nan, 0.0]), torch.zeros(2), 5) == [1]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([-100, -100, 7, 8, 1], Asked([5, 6], [7, 8, 1], [], True)),
        ([-100, -100, 7, 1, 9], Asked([5, 6], [7, 1], [9], True)),  # a template's line break after the end
        ([-100, 6, -100, 8, 1], Asked([5, 6, 7], [8, 1], [], True)),  # the last answer of a conversation
        ([-100, -100, 7, 8, -100], Asked([5, 6], [7, 8], [], False)),  # cut by the trainer: it has no end
        ([5, 6, 7, 8, 1], Asked([5, 6], [7, 8, 1], [], False)),  # a text: its second half, and no end is needed
        ([-100, -100, 1, -100, -100], None),
        ([-100] * 5, None),
    ],
)
def test_what_is_asked_of_a_row(labels, found):
    tokens = [label if label != -100 else 5 + i for i, label in enumerate(labels)]
    assert asked_of(np.array(tokens), np.array(labels), ENDS) == found


def test_a_row_with_another_answer():
    assert Asked([5, 6], [7, 1], [9], True).row([8, 1]) == {
        "input_ids": [5, 6, 8, 1, 9],
        "labels": [-100, -100, 8, 1, 9],
    }
    assert asked_of(np.array([4]), np.array([4]), ENDS) is None  # nothing would be before the answer


@pytest.mark.parametrize(
    "rows", [[], [Asked([5, 6], [7, 1], [9], True).row([8, 1]), Asked([2], [1], [], True).row([3, 1])]]
)
def test_rows_as_tensors_and_back(rows):
    assert unpacked_rows(packed_rows(rows)) == rows


def test_counts_by_hand():
    """Six answers: two without use, one below the threshold, one outranked, two kept."""
    asked = [Asked([5], [7, 1], [], True)] * 6
    found = [
        Answer(tokens, value) for tokens, value in
        [([7, 7], -0.1), ([1], -0.1), ([8, 1], -3.0), ([8, 1], -1.0), ([7, 1], -0.5), ([9, 1], -0.7)]
    ]  # fmt: skip
    counts = Counts(rows=6, asked=6)
    chosen = choose(asked, found, ENDS, lambda q, a: a.log_probability if a.log_probability >= -2 else None, 2, counts)
    assert chosen == [4, 5]
    assert (counts.unfinished, counts.empty, counts.below, counts.outranked, counts.kept, counts.same) == (
        1,
        1,
        1,
        1,
        2,
        1,
    )
    assert counts.rejected == 3 and counts.log_probability == pytest.approx(-0.6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, 5])
def test_log_probabilities_are_the_models(temperature, top_k):
    """Of each token written, whatever it was drawn with; padded prompts as on their own, and the run's draws untouched."""
    model, prompts = toy.model().train(), [[5, 9, 12, 30], [7], [8, 20]]
    before = torch.get_rng_state()
    how = Sampling(5, top_k, temperature=temperature)
    found = sampling.answers(model, toy.tokenizer(), prompts, (0, 1), how, ENDS)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert found == sampling.answers(model, toy.tokenizer(), prompts, (0, 1), how, ENDS)
    model.eval()
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([[*prompt, *answer.tokens]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        loss = cross_entropy(logits, ids[0, len(prompt) :])
        assert answer.log_probability == pytest.approx(-float(loss.detach()), abs=1e-5)
        if temperature == 0:
            assert logits.argmax(-1).tolist() == answer.tokens
    if temperature:
        assert found != sampling.answers(model, toy.tokenizer(), prompts, (0, 2), how, ENDS)


def left(folder):
    return handover.state_of(handover.read(Path(folder)), NAME)


def test_what_is_kept_is_what_the_model_says(first):
    """Three of six rows, answered greedily by the saved weights; the likeliest of the six by an independent measure."""
    trainer = build(str(first), first.parent / "again", pairs(0), max_steps=1)
    model, rows = trainer.model.eval(), unpacked_rows(left(first))
    assert len(rows) == 3
    asked = [[4 + i, 5 + i] for i in range(6)]
    value = {}
    for prompt in asked:
        ids = [*prompt, int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())]
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        logits = model(input_ids=torch.tensor([ids])).logits[0, 1:-1]
        value[tuple(ids)] = -float(cross_entropy(logits, torch.tensor(ids[2:])).detach())
    assert sorted(tuple(row["input_ids"]) for row in rows) == sorted(sorted(value, key=value.__getitem__)[-3:])
    assert all(row["labels"] == [-100, -100, *row["input_ids"][2:]] for row in rows)


def test_the_first_task_is_kept(tmp_path, first):
    kept = {}
    asked = [[*row["input_ids"]] for row in unpacked_rows(left(first))]
    for ratio in (0.0, 0.5):
        settings = {"task_index": 1, "task_name": "second", "max_steps": 40, "learning_rate": 5e-3}
        trainer = build(
            str(first),
            tmp_path / str(ratio),
            pairs(30),
            OnPolicyReplay(share=0.5, ratio=ratio, temperature=0),
            **settings,
        )
        trainer.train()
        losses = []
        for ids in asked:
            logits = trainer.model.eval()(input_ids=torch.tensor([ids])).logits[0, 1:-1]
            losses.append(float(cross_entropy(logits, torch.tensor(ids[2:])).detach()))
        kept[ratio] = sum(losses) / len(losses)
    assert kept[0.5] < 0.5 and kept[0.0] > 2.0, kept
    state = trainer.task_states[NAME]
    assert [r["task"] for r in state["reports"]] == ["first", "second"] and len(unpacked_rows(state)) == 6
    asked, first_step = state["reports"][0], trainer.state.log_history[0]
    for key in ("asked", "kept", "outranked", "log_probability"):
        assert first_step[f"{NAME}/{key}"] == pytest.approx(asked[key])  # what the first task left, logged once
    assert first_step[f"{NAME}/rejected"] == asked["asked"] - asked["kept"] - asked["outranked"]
    assert f"{NAME}/kept" not in trainer.state.log_history[1]


def wrong(rows):
    """The same questions with other answers, which the model does not give."""
    return Dataset.from_list([{**row, "completion": " w59"} for row in rows])


def test_a_score_against_the_rows_answer(tmp_path, first, caplog):
    """Two wrong rows of six: only answers that match are kept, however likely the others are."""
    rows = Dataset.from_list([*pairs(0, 4), *wrong(pairs(4, 2))])
    options = {"share": 1.0, "candidates": 1, "temperature": 0, "select": "exact"}
    with caplog.at_level(logging.INFO):
        trainer = build(str(first), tmp_path, rows, OnPolicyReplay(**options), max_steps=1, learning_rate=1e-7)
        trainer.train()
    report = trainer.task_states[NAME]["reports"][-1]
    assert (report["kept"], report["same"], report["below"]) == (4, 4, 2)
    assert "Kept: 4 answers, 4 of them the row's own. Rejected: 2 (0 without an end, 0 empty, 2 below" in caplog.text


def test_below_the_threshold_nothing_is_kept(tmp_path, caplog):
    method = OnPolicyReplay(share=1.0, threshold=-0.001, candidates=1)
    trainer = build(toy.model(), tmp_path, toy.rows("prompt_completion"), method, max_steps=1)
    trainer.train()
    assert "no answer to 24 prompts can be kept, so later tasks replay none of this one" in caplog.text
    trainer.save_model()
    again = build(str(tmp_path), tmp_path / "two", pairs(0), OnPolicyReplay(), task_index=1, max_steps=1)
    again.train()  # with an empty buffer
    assert "no earlier task left answers" in caplog.text and len(again.task_states[NAME]["reports"]) == 2


@pytest.mark.parametrize("layout", [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}])
def test_rows_within_packed_ones_are_asked(tmp_path, layout):
    trainer = build(toy.model(), tmp_path, toy.rows("prompt_completion"), example(None), **layout)
    trainer.train()
    report = trainer.task_states[NAME]["reports"][0]
    assert report["rows"] == 24 and report["asked"] + report["unusable"] == 12


def test_an_answer_fits_into_max_length(tmp_path):
    trainer = build(
        toy.model(),
        tmp_path,
        toy.rows(),
        OnPolicyReplay(share=1.0, candidates=1, temperature=1.0),
        max_length=8,
        max_steps=1,
    )
    trainer.train()
    rows = unpacked_rows(trainer.task_states[NAME])
    assert rows and max(len(row["input_ids"]) for row in rows) <= 8


def test_a_killed_writing_resumes(tmp_path, monkeypatch):
    """Finished batches are not written again, and the rows are those of an uninterrupted run."""
    rows, calls, real = toy.rows("prompt_completion"), [], written_answers.answers

    def trainer(folder):
        return build(toy.model(), tmp_path / folder, rows, OnPolicyReplay(share=0.5, batch_rows=6, temperature=1.0))

    def counted(*args):
        calls.append(args[3])
        return real(*args)

    monkeypatch.setattr(written_answers, "answers", counted)
    straight = trainer("straight")
    straight.train()
    whole = calls.copy()
    assert len(whole) == 4 == len(set(whole)) and not list((tmp_path / "straight").glob("*.unfinished"))

    def killed(*args):
        if len(calls) == len(whole) + 2:
            raise KeyboardInterrupt
        return counted(*args)

    monkeypatch.setattr(written_answers, "answers", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer("killed").train()
    assert (tmp_path / "killed" / f"continual-{NAME}.unfinished").is_file()
    calls.clear()
    monkeypatch.setattr(written_answers, "answers", counted)
    resumed = trainer("killed")
    resumed.train()
    assert calls == whole[2:]
    assert unpacked_rows(resumed.task_states[NAME]) == unpacked_rows(straight.task_states[NAME])


@pytest.mark.parametrize("rank", [0, 1])
def test_several_processes_write_what_one_writes(tmp_path, monkeypatch, rank):
    trainer = build(toy.model(), tmp_path, pairs(0), example(None))
    asked = [Asked([5 + i], [7, 1], [], True) for i in range(5)]
    how = Sampling(4, 0)

    class Nothing:
        def read(self):
            return 0, {}

        def write(self, done, sums):
            assert len(sums["values"]) == min(done * 2, 5)

    alone = write_answers(trainer.run, asked, how, 2, ENDS, Nothing())
    batches = [alone[:2], alone[2:4], alone[4:]]
    rounds = iter([batches[:2], [batches[2], None]])

    def gathered(mine):
        everyone = next(rounds)
        assert mine == everyone[rank]
        return everyone

    monkeypatch.setattr(pseudo_samples, "world", lambda: (2, rank))
    monkeypatch.setattr(pseudo_samples, "all_well", lambda problem: None)
    monkeypatch.setattr(pseudo_samples, "gathered", gathered)
    assert write_answers(trainer.run, asked, how, 2, ENDS, Nothing()) == alone


def test_rows_are_handed_over_and_not_pushed(tmp_path, first, caplog):
    """They stay here unless requested by name; a model without them trains further, and says so."""
    own = [f"continual/{NAME}.json", f"continual/{NAME}.safetensors"]
    pushed = collect(first)
    assert not set(own) & set(pushed.files) and set(own) <= set(pushed.left_out)
    assert set(own) <= set(collect(first, include=own).files)
    assert read_facts(first).learned == ()
    shutil.copytree(first, tmp_path / "pulled")
    for name in own:
        (tmp_path / "pulled" / name).unlink()
    assert handover.read(tmp_path / "pulled").names == [NAME]
    assert not set(own) & set(collect(tmp_path / "pulled").files)
    trainer = build(
        str(tmp_path / "pulled"), tmp_path / "two", pairs(30), OnPolicyReplay(temperature=0), task_index=1, max_steps=1
    )
    trainer.train()
    assert "the rows that method 'on_policy_replay' kept did not come with the model" in caplog.text
    assert "--include continual/on_policy_replay" in caplog.text
    shutil.copytree(first, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "continual")
    handover.bring_along(tmp_path / "pulled", tmp_path / "moved")
    assert handover.read(tmp_path / "moved").names == [NAME]
    shutil.copytree(first, tmp_path / "damaged")
    (tmp_path / "damaged" / own[1]).unlink()  # one of two: damage, not a choice
    with pytest.raises(handover.HandOverError, match=r"on_policy_replay\.safetensors is missing"):
        left(tmp_path / "damaged")


def test_another_tokenizer_is_refused(tmp_path, first):
    state = {**left(first), "vocabulary": 7}
    trainer = build(str(first), tmp_path, pairs(30), OnPolicyReplay(), task_index=1)
    with pytest.raises(
        ValueError, match="tokens of a tokenizer with 7 words, and this run's has 64. Give the same tokenizer"
    ):
        next(iter(trainer.methods)).load_task_state(state, trainer.run)


def test_a_plan_hands_over_between_adapters(tmp_path):
    plan = world.make(
        tmp_path, peft={"r": 2, "target_modules": "all-linear"},
        methods=[{NAME: {"share": 0.5, "max_new_tokens": 4, "temperature": 1.0}}],
    )  # fmt: skip
    plan["tasks"] = plan["tasks"][:2]
    train_stream(plan)
    files = [p for p in (tmp_path / "out").rglob(f"continual/{NAME}.json") if "checkpoint" not in str(p)]
    assert sorted(len(json.loads(file.read_text())["reports"]) for file in files) == [1, 2]


def test_an_adapter_answers(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = build(toy.model(), tmp_path, pairs(0), OnPolicyReplay(temperature=1.0), peft=lora, max_steps=2)
    trainer.train()
    assert trainer.task_states[NAME]["reports"][0]["asked"] == 2


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"share": 1.5}, ValueError, r"OnPolicyReplay\(share=1.5\) must lie between 0 and 1"),
        ({"ratio": 1.0}, ValueError, r"OnPolicyReplay\(ratio=1.0\) must lie between 0 and 1, 1 excluded"),
        ({"candidates": 0.5}, ValueError, "at least 1"),
        ({"temperature": -1}, ValueError, "at least 0"),
        ({"threshold": "high"}, TypeError, "must be a number"),
        ({"top_k": 1.5}, TypeError, "whole number"),
        ({"batch_rows": 0}, ValueError, "at least 1"),
        ({"max_new_tokens": 0}, ValueError, "at least 1"),
        ({"select": "best"}, ValueError, r"OnPolicyReplay\(select='best'\): unknown match 'best'.*Or give 'log_probability'"),
        ({"name": "a/b"}, ValueError, "without '/'"),
    ],
)  # fmt: skip
def test_hyper_parameters_out_of_range(options, error, said):
    with pytest.raises(error, match=said):
        OnPolicyReplay(**options)


def test_a_stream_of_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows, but they are a stream"):
        build(toy.model(), tmp_path, pairs(0).to_iterable_dataset(), OnPolicyReplay(), max_steps=1)
    build(toy.model(), tmp_path, pairs(0).to_iterable_dataset(), OnPolicyReplay(share=0), max_steps=1).train()
