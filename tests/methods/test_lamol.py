"""LAMOL: the loss worked by hand, each row beside itself, samples that survive a kill, and that rehearsing helps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy

from hf_continual import LAMOL, ContinualConfig, ContinualTrainer, Forward, Replay, train_stream
from hf_continual.data import handover
from hf_continual.methods import pseudo_samples
from hf_continual.stream.dry_run import _micro_batch
from hf_continual.trainer.trainer_run import TrainerRun
from tests import toy
from tests.stream import world

ZERO_TOLERANCE = 0.0
NEEDS_PREDECESSOR = True
EXTRA_FORWARDS = 48  # two batches of samples of 24 tokens each
SHORTER = {"gen_marker": "w57", "answer_marker": "w58"}  # the toy tokenizer has no tokens for the usual ones
GEN, ANS = 61, 62


def example(world):
    return LAMOL(gamma=0.5, lm_weight=0.5, top_k=0, max_new_tokens=24, batch_rows=8, **SHORTER)


def zero(world):
    return LAMOL(gamma=0, lm_weight=0, **SHORTER)


def lamol(**options):
    return LAMOL(**{"top_k": 0, "batch_rows": 8, **SHORTER, **options})


def pairs(low, number=6):
    """Questions of two words with an answer of one, the words from `low` on."""
    return Dataset.from_list(
        [{"prompt": f"w{low + i} w{low + i + 1}", "completion": f" w{low + i}"} for i in range(number)]
    )


def only(trainer):
    """Its first method."""
    return next(iter(trainer.methods))


def build(start, folder, rows, *methods, peft=None, **settings):
    return ContinualTrainer(
        start, ContinualConfig(**toy.settings(folder, **settings)), train_dataset=rows, processing_class=toy.tokenizer(),
        peft_config=peft, methods=list(methods),
    )  # fmt: skip


def learned(folder, **options):
    """A model that knows six questions and can write them."""
    settings = {"max_steps": 150, "learning_rate": 5e-3, "per_device_train_batch_size": 6, "logging_steps": 200}
    trainer = build(toy.model(), folder, pairs(0), lamol(lm_weight=1.0, **options), task_name="first", **settings)
    trainer.train()
    trainer.save_model()
    return str(folder)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return learned(tmp_path_factory.mktemp("first"))


def test_the_terms_by_hand():
    """One task row with two trained tokens, one text row with three, one padded place."""
    loss = torch.tensor([[0.0, 2.0, 4.0, 0.0], [1.0, 2.0, 6.0, 0.0]])
    labels = torch.tensor([[-100, -100, 5, 1, -100], [-100, 5, 5, 1, -100]])
    source = torch.tensor([[-1, -1, -1, -1, -100], [0, 0, 0, 0, -100]])
    nowhere = torch.full_like(source, -1)
    forward = Forward(
        inputs={"labels": labels}, token_loss_BS=loss, taps={}, source_BS=source, row_BS=nowhere, offset_BS=nowhere,
        sources=("lamol",), tokens=torch.tensor(2), scale=1.0,
    )  # fmt: skip
    assert float(LAMOL(lm_weight=0.25).loss_terms(forward)["lm"]) == 0.25 * 3.0
    nothing = Forward(**{**vars(forward), "source_BS": source.clamp(max=-1)})
    assert float(LAMOL(lm_weight=0.25).loss_terms(nothing)["lm"]) == 0.0


def mean_loss(model, rows, ignored=0):
    """Mean over trained tokens, row by row, without any of the library."""
    losses = []
    for ids, start in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        losses.append(cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_is_the_papers_loss(tmp_path, accumulation):
    """L_QA + lambda L_LM over the very rows, and the weights after one step of gradient descent with it."""
    rows = pairs(0, 4)
    settings = {"max_steps": 1, "per_device_train_batch_size": 4 // accumulation, "optim": "sgd", "learning_rate": 0.5}
    trainer = build(
        toy.model(), tmp_path, rows, lamol(gamma=0, lm_weight=0.25), max_grad_norm=0.0,
        gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    trainer.train()
    model = toy.model()
    words = [(4 + i, 5 + i, 4 + i) for i in range(4)]
    asked = [([a, b, c, 1], 2) for a, b, c in words]
    written = [([GEN, a, b, ANS, c, 1], 1) for a, b, c in words]
    loss = mean_loss(model, asked) + 0.25 * mean_loss(model, written)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.5 * p.grad
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(toy.flat(trainer.model), toy.flat(model), rtol=0, atol=1e-6)


LAYOUTS = {
    "padded": {},
    "flattened": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 24},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("replay", [False, True])
def test_each_row_has_itself_beside_it(tmp_path, layout, replay):
    """In its own micro-batch, whatever the layout, and replay counts it as given."""
    more = [Replay(pairs(20), ratio=0.3)] if replay else []
    trainer = build(
        toy.model(), tmp_path, toy.rows("prompt_completion"), lamol(gamma=0), *more, gradient_accumulation_steps=2,
        **LAYOUTS[layout],
    )  # fmt: skip
    seen = []

    class Looking(type(only(trainer))):
        def loss_terms(self, forward):
            seen.append(forward)
            return super().loss_terms(forward)

    only(trainer).__class__ = Looking
    trainer.train()
    assert len(seen) >= 6
    for forward in seen:
        ids, source, labels = forward.inputs["input_ids"], forward.source_BS, forward.inputs["labels"]
        task = ids[source == -1].tolist()
        texts = ids[source == forward.sources.index("lamol")].tolist()
        assert task and [i for i in texts if i not in (GEN, ANS)] == task
        rows = texts.count(GEN)
        assert rows == texts.count(ANS) == task.count(1) >= 4
        # All but the marker in front is trained; where rows are one, the first token of each document is not.
        trained = (labels != -100) & (source == forward.sources.index("lamol"))
        assert int(trained.sum()) == len(texts) - rows
        assert sum(k == forward.sources.index("lamol") for k, *_ in forward.drawn) == rows
    if replay:
        (lm, draws) = trainer.replay_totals().sum(axis=1).tolist()
        assert draws[1] / (lm[0] + lm[1] + draws[1]) == pytest.approx(0.3, abs=0.06)


def test_a_model_writes_what_it_learned_and_keeps_it(tmp_path, first, caplog):
    """The samples are rows of the first task, and with them it is not forgotten while the second is learned."""
    kept = {}
    settings = {"max_steps": 60, "learning_rate": 5e-3, "per_device_train_batch_size": 6}
    for gamma in (0.0, 1.0):
        with caplog.at_level(logging.INFO):
            trainer = build(
                first, tmp_path / str(gamma), pairs(30), lamol(gamma=gamma, lm_weight=1.0), task_index=1,
                task_name="second", **settings,
            )  # fmt: skip
            trainer.train()
        asked = [([4 + i, 5 + i, 4 + i, 1], 2) for i in range(6)]
        kept[gamma] = float(mean_loss(trainer.model.eval(), asked).detach())
        entry = trainer.state.log_history[0]
    assert kept[1.0] < 1.0 and kept[0.0] > 2.0, kept
    report = trainer.task_states["lamol"]["reports"][0]
    assert report["task"] == "second" and report["written"] == 6 == report["kept"] + report["malformed"]
    assert report["kept"] >= 4 and report["invented"] <= 1 and entry["lamol/kept"] == report["kept"]
    assert "lamol/kept" not in trainer.state.log_history[1]
    assert "6 samples of earlier tasks were wanted and 6 written" in caplog.text
    assert trainer.task_states["lamol"]["tasks"] == ["first", "second"]
    assert len(trainer.train_dataset) == 6 + report["kept"]


def test_an_adapter_needs_no_new_token(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    start = toy.model()
    start.save_pretrained(tmp_path / "base")
    trainer = build(str(tmp_path / "base"), tmp_path / "one", pairs(0), lamol(), peft=lora, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert trainer.model.get_input_embeddings().weight.shape[0] == len(toy.VOCABULARY)
    assert all("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    again = build(
        str(tmp_path / "one"), tmp_path / "two", pairs(30), lamol(max_new_tokens=8), task_index=1, max_steps=2
    )
    again.train()
    assert again.task_states["lamol"]["reports"][0]["written"] == 2  # 0.2 of 6 rows, rounded up


def test_task_markers_write_each_task_by_its_name(tmp_path):
    """Evenly, and a sample keeps its task's marker in the text format."""
    options = {"task_markers": True, "lm_weight": 1.0}
    settings = {"max_steps": 150, "learning_rate": 5e-3, "per_device_train_batch_size": 6, "logging_steps": 200}
    start = toy.model()
    start.save_pretrained(tmp_path / "base")
    folder = tmp_path / "base"
    for index, name in enumerate(("w50", "w51", "w52")):
        trainer = build(
            str(folder), tmp_path / name, pairs(10 * index), lamol(**options, gamma=1.0, tries=2), task_index=index,
            task_name=name, **settings,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        folder = tmp_path / name
    (method,) = trainer.methods
    of = {how.generate: [] for how in method._pairs.earlier.values()}
    for row in method._pseudo:
        text = method._pairs(row["input_ids"], row["labels"])["input_ids"]
        of[tuple(text[:2])].append(text[2] - 4)
    assert list(of) == [(GEN, 54), (GEN, 55)]
    assert all(1 <= len(words) <= 6 for words in of.values())
    assert sum(w < 10 for w in of[GEN, 54]) > len(of[GEN, 54]) / 2 < sum(10 <= w < 20 for w in of[GEN, 55]) * 2


def test_a_killed_writing_resumes(tmp_path, first, monkeypatch):
    """Finished batches are not written again, and the samples are those of an uninterrupted run."""
    settings = {"task_index": 1, "max_steps": 1}
    options = {"gamma": 1.0, "batch_rows": 2, "tries": 2}
    straight = build(first, tmp_path / "straight", pairs(30), lamol(**options), **settings)
    real, calls = pseudo_samples.sample, []

    def counted(*args):
        calls.append(args[4])
        return real(*args)

    monkeypatch.setattr(pseudo_samples, "sample", counted)
    straight.train()
    assert not list((tmp_path / "straight").glob("*.unfinished"))
    whole = calls.copy()
    assert len(whole) >= 3 and len(set(whole)) == len(whole)

    def killed(*args):
        if len(calls) == len(whole) + 2:
            raise KeyboardInterrupt
        return counted(*args)

    monkeypatch.setattr(pseudo_samples, "sample", killed)
    interrupted = build(first, tmp_path / "killed", pairs(30), lamol(**options), **settings)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert (tmp_path / "killed" / "continual-lamol.unfinished").is_file()
    calls.clear()
    monkeypatch.setattr(pseudo_samples, "sample", counted)
    resumed = build(first, tmp_path / "killed", pairs(30), lamol(**options), **settings)
    resumed.train()
    assert calls == whole[2:]
    assert only(resumed)._pseudo == only(straight)._pseudo
    assert torch.equal(toy.flat(resumed.model), toy.flat(straight.model))


@pytest.mark.parametrize("rank", [0, 1])
def test_several_processes_write_what_one_writes(first, tmp_path, monkeypatch, rank):
    """Each takes every second batch; what the other writes is what one process writes there."""
    trainer = build(first, tmp_path, pairs(30), lamol(), task_index=1)
    model, how, ends = trainer.model, pseudo_samples.Sampling(8, 0), frozenset({1})

    class Nothing:
        def read(self):
            return 0, {}

        def write(self, done, sums):
            assert len(pseudo_samples._unpacked(sums)) == done

    args = (trainer.run, Nothing(), [([GEN], ends), ([GEN, ANS], ends)], 6, how, 4, 2, lambda k, text: text[-1] == 1)
    alone = pseudo_samples.write_samples(*args)
    numbers = [(k, n) for k in (0, 1) for n in (4, 2)]
    asked = []

    def gathered(mine):
        if mine is None:  # no process has a problem
            return [None, None]
        first_of_round = asked[-1][1] - rank
        texts = []
        for r in (0, 1):
            place = first_of_round + r
            opening, rows = asked[-1][2][r] if r < len(asked[-1][2]) else (None, 0)
            texts.append(
                pseudo_samples.sample(
                    model, trainer.processing_class, opening, rows, (trainer.run.seed, 1, place), how, ends
                )
                if rows
                else []
            )
        assert mine == texts[rank]
        return texts

    real = pseudo_samples._round

    def round_(run, batches, number, openings, how_):
        asked.append((rank, number + rank, [(openings[k][0], rows) for k, rows in batches[:2]]))
        return real(run, batches, number, openings, how_)

    monkeypatch.setattr(pseudo_samples, "world", lambda: (2, rank))
    monkeypatch.setattr(pseudo_samples, "all_well", lambda problem: None)
    monkeypatch.setattr(pseudo_samples, "gathered", gathered)
    monkeypatch.setattr(pseudo_samples, "_round", round_)
    assert pseudo_samples.write_samples(*args) == alone
    assert numbers and all(len(texts) >= 6 for texts in alone)


def test_a_second_call_of_train_keeps_its_samples(tmp_path, first):
    trainer = build(first, tmp_path, pairs(30), lamol(gamma=1.0), task_index=1, max_steps=2)
    trainer.train()
    samples, rows = only(trainer)._pseudo, len(trainer.train_dataset)
    trainer.train()
    assert only(trainer)._pseudo is samples and len(trainer.train_dataset) == rows


def test_other_samples_than_the_run_began_with_are_refused(tmp_path, first):
    settings = {"task_index": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = build(first, tmp_path, pairs(30), lamol(gamma=1.0, lm_weight=1.0), **settings)
    trainer.train()
    file = tmp_path / "checkpoint-1" / "continual" / "lamol.json"
    assert json.loads(file.read_text())["samples"]
    (method,) = build(first, tmp_path / "other", pairs(30), lamol(gamma=1.0), **settings).methods
    with pytest.raises(ValueError, match="the samples of earlier tasks are not the ones.*continual-lamol.unfinished"):
        method.load_state_dict({"samples": "0"}, None)


def test_what_is_left_for_the_next_task(first):
    left = handover.read(Path(first))
    state = handover.state_of(left, "lamol")
    assert state["tasks"] == ["first"] and state["longest"] == 6 and state["questions"] and not state["plain"]
    assert state["questions_known"].shape == state["pairs_known"].shape == (6,)
    assert state["questions_known"].dtype == torch.int64 and state["reports"] == []


def test_without_hashes_inventions_are_not_counted(tmp_path):
    folder = learned(tmp_path / "first", count_invented=False)
    assert "questions_known" not in handover.state_of(handover.read(Path(folder)), "lamol")
    trainer = build(folder, tmp_path / "second", pairs(30), lamol(gamma=1.0), task_index=1, max_steps=1)
    trainer.train()
    report = trainer.task_states["lamol"]["reports"][0]
    assert report["invented"] is None and report["duplicated"] >= 0
    assert "questions_known" not in trainer.task_states["lamol"]  # of some tasks only, it would count wrongly
    assert "lamol/invented" not in trainer.state.log_history[0]


def test_conversations_of_one_turn(tmp_path):
    trainer = build(toy.model(), tmp_path, toy.rows("messages"), lamol(gamma=0), assistant_only_loss=True, max_steps=1)
    row = trainer.run.rows(only(trainer))[0]
    assert row["input_ids"][0] == GEN and row["input_ids"].count(ANS) == 1 and row["input_ids"][-1] == 1
    trainer.train()


def several_turns():
    turns = [{"role": r, "content": "w1 w2"} for r in ("user", "assistant", "user", "assistant")]
    return Dataset.from_list([{"messages": turns}] * 4)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"gamma": -0.1}, ValueError, r"LAMOL\(gamma=-0.1\) must be a finite number of at least 0"),
        ({"lm_weight": -1}, ValueError, r"LAMOL\(lm_weight=-1\)"),
        (
            {"lm_weight": 0},
            ValueError,
            "a model that is never taught to write them. Give lm_weight above 0, or gamma=0",
        ),
        ({"top_k": 1.5}, TypeError, "whole number"),
        ({"tries": 0}, ValueError, "at least 1"),
        ({"max_new_tokens": 1}, ValueError, "at least 2"),
        ({"repetition_penalty": 0.5}, ValueError, "at least 1"),
        ({"gen_marker": " "}, ValueError, r"LAMOL\(gen_marker=' '\) must be a short text that no row holds"),
        ({"name": "a/b"}, ValueError, "without '/'"),
    ],
)
def test_hyper_parameters_out_of_range(options, error, said):
    with pytest.raises(error, match=said):
        LAMOL(**options)


def test_rows_and_runs_that_cannot_work(tmp_path, first):
    with pytest.raises(ValueError, match="LAMOL: row 0 holds the tokens .4. of a marker"):
        build(toy.model(), tmp_path, pairs(0), LAMOL(gen_marker="w0", answer_marker="w58"))
    with pytest.raises(ValueError, match="several trained parts.*Split conversations"):
        build(toy.model(), tmp_path, several_turns(), lamol(), assistant_only_loss=True)
    with pytest.raises(ValueError, match="none of the 6 rows has room.*Raise max_length"):
        build(toy.model(), tmp_path, pairs(0), lamol(), max_length=5)
    with pytest.raises(ValueError, match="rows, but they are a stream"):
        build(toy.model(), tmp_path, pairs(0).to_iterable_dataset(), lamol())
    with pytest.raises(ValueError, match="learned with the markers.*'w57'.*Give the same markers.*fresh_methods=True"):
        build(first, tmp_path, pairs(30), LAMOL(gen_marker="w56", answer_marker="w58"), task_index=1).train()
    fresh = build(
        first, tmp_path, pairs(30), LAMOL(gen_marker="w56", answer_marker="w58"), task_index=1, fresh_methods=True, max_steps=1
    )  # fmt: skip
    fresh.train()  # the way out works
    assert fresh.task_states["lamol"]["tasks"] == ["task"]


def test_a_later_task_without_an_earlier_one(tmp_path, caplog):
    build(toy.model(), tmp_path, pairs(0), lamol(), task_index=2, max_steps=1).train()
    assert "no earlier task was learned with it, so no samples are written before task 3" in caplog.text


def test_a_model_that_writes_nothing_readable(tmp_path, caplog):
    trainer = build(toy.model(), tmp_path / "one", pairs(0), lamol(), max_steps=1)
    trainer.train()
    trainer.save_model()
    again = build(
        str(tmp_path / "one"), tmp_path / "two", pairs(30), lamol(max_new_tokens=2), task_index=1, max_steps=1
    )
    again.train()
    assert (
        "none of the 2 samples has the format, so nothing is rehearsed. Train the earlier tasks longer" in caplog.text
    )
    assert len(again.train_dataset) == 6


def test_rows_too_long_for_the_format_are_said(tmp_path, caplog):
    rows = Dataset.from_list([*pairs(0), {"prompt": "w1 " * 9, "completion": " w2"}])
    trainer = build(toy.model(), tmp_path, rows, lamol(), max_length=12, max_steps=2, per_device_train_batch_size=7)
    trainer.train()
    assert "1 of 7 rows have no room for the markers within 12 tokens" in caplog.text
    assert trainer.replay_totals().sum(axis=1)[0, 2] == 12  # six of seven, twice


def test_the_run_tells_packed_rows_apart(tmp_path):
    trainer = build(toy.model(), tmp_path, pairs(0), lamol(gamma=0), packing=True, max_length=16)
    assert isinstance(trainer.run, TrainerRun) and trainer.run.task_rows.column_names == [
        "input_ids",
        "labels",
        "seq_lengths",
    ]
    assert only(trainer)._survey.rows == 6


BATCH = {"per_device_train_batch_size": 4, "max_length": 64, "packing": False, "padding_free": False}


def test_a_plan_hands_over_and_foretells_twice_the_rows(tmp_path):
    """Two tasks of a plan, an adapter trained further; the dry run counts the row beside each row."""
    plan = world.make(
        tmp_path, peft={"r": 2, "target_modules": "all-linear"}, methods=[{"lamol": {**SHORTER, "gamma": 0.5}}]
    )
    plan["tasks"] = plan["tasks"][:2]
    added, tokens = _micro_batch(SimpleNamespace(**BATCH), [lamol().added_rows()], 10, 0.0)
    assert (added, tokens) == (4, 80)
    train_stream(plan)
    (folder,) = [
        p.parents[1]
        for p in (tmp_path / "out").rglob("continual/lamol.json")
        if "t1" in str(p) and "checkpoint" not in str(p)
    ]
    left = handover.state_of(handover.read(folder), "lamol")
    assert left["tasks"] == ["t0", "t1"] and left["reports"][0]["written"] == 4
