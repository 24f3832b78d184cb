"""EWC: the published code's numbers, the closed form against autograd, and the state handed to the next task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from hf_continual import EWC, ContinualConfig, ContinualTrainer, Method
from hf_continual.methods import ewc
from hf_continual.methods.ewc import add_penalty_gradients_, fisher_diagonal, merged_fisher, penalty, penalty_gradients
from tests import toy
from tests.methods.fake_run import FakeRun

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "baselines" / "ewc.safetensors")
NAMES = ("e.weight", "o.weight", "o.bias")

ZERO_TOLERANCE = 0.0
NEEDS_PREDECESSOR = True
EXTRA_FORWARDS = 6  # 24 rows in batches of 8, two micro-batches each


def example(world):
    return EWC(weight=1e5, over_tasks="sum")


def zero(world):
    return EWC(weight=0.0)


def part(prefix):
    return {name: GOLDEN[f"{prefix}/{name}"] for name in NAMES}


def golden_loss(params, batch):
    ids, labels = GOLDEN[f"batch/{batch}/ids"], GOLDEN[f"batch/{batch}/labels"]
    logits = nn.functional.linear(params["e.weight"][ids], params["o.weight"], params["o.bias"])
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def test_the_published_fisher():
    params = {n: p.clone().requires_grad_() for n, p in part("param").items()}
    fisher = fisher_diagonal((golden_loss(params, batch) for batch in (0, 1)), params, (3, 2))
    for name in NAMES:
        torch.testing.assert_close(fisher[name], GOLDEN[f"fisher/{name}"], rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="at least one row"):
        fisher_diagonal([], params, [])


def test_the_published_penalty_and_running_mean():
    found = penalty(part("moved"), part("param"), part("fisher"), 1.0)
    torch.testing.assert_close(found, GOLDEN["penalty_unscaled"][0], rtol=1e-6, atol=0)
    merged = merged_fisher(part("fisher"), part("fisher_old"), 1, "mean", 0.9)
    for name in NAMES:
        torch.testing.assert_close(merged[name], GOLDEN[f"merged_fisher_task1/{name}"], rtol=1e-6, atol=1e-9)


def test_the_closed_form_is_the_gradient_of_the_penalty():
    params = {n: p.clone().requires_grad_() for n, p in part("moved").items()}
    penalty(params, part("param"), part("fisher"), 7.0).backward()
    closed = penalty_gradients(params, part("param"), part("fisher"), 7.0)
    assert closed.keys() == params.keys()
    for name, p in params.items():
        torch.testing.assert_close(closed[name], p.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("at_once", [1, 60, 1 << 25])
def test_added_in_pieces_it_is_the_same(monkeypatch, at_once):
    monkeypatch.setattr(ewc, "AT_ONCE", at_once)
    moved, anchors, fisher = part("moved"), part("param"), part("fisher")
    grads = {n: torch.ones_like(t, dtype=torch.bfloat16 if n == "o.bias" else None) for n, t in moved.items()}
    add_penalty_gradients_(grads, moved, anchors, fisher, 7.0)
    for name, closed in penalty_gradients(moved, anchors, fisher, 7.0).items():
        assert torch.equal(grads[name], 1 + closed.to(grads[name].dtype))


class AsALossTerm(Method):
    """The penalty in the loss, with a graph."""

    name = "term"

    def __init__(self, method):
        self.method = method

    def describe(self):
        return {}

    def begin_task(self, run):
        self.params = run.named_parameters()

    def loss_terms(self, forward):
        return {"penalty": penalty(self.params, *self.method._live, self.method.weight)}


def test_the_gradient_edit_is_the_penalty_in_the_loss(tmp_path):
    """With accumulation and without clipping, which would clip only one of the two."""
    train(toy.model(), tmp_path / "first").save_model()
    settings = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.05}
    edited = train(str(tmp_path / "first"), tmp_path / "a", method=EWC(weight=100.0), seed=2, **settings)
    holder = EWC(weight=100.0)
    trainer = ContinualTrainer(
        str(tmp_path / "first"), ContinualConfig(**toy.settings(tmp_path / "b", **settings)),
        train_dataset=toy.rows(seed=2), processing_class=toy.tokenizer(), methods=[holder, AsALossTerm(holder)],
    )  # fmt: skip
    holder.edit_gradients = lambda params: None
    trainer.train()
    free = train(str(tmp_path / "first"), tmp_path / "c", method=EWC(weight=0.0), seed=2, **settings)
    torch.testing.assert_close(toy.flat(edited.model), toy.flat(trainer.model), rtol=0, atol=1e-6)
    assert (toy.flat(edited.model) - toy.flat(free.model)).abs().max() > 1e-4


def test_several_tasks():
    new, old = (
        {"a": torch.tensor([4.0]), "b": torch.tensor([2.0])},
        {"a": torch.tensor([1.0]), "c": torch.tensor([3.0])},
    )
    values = {
        kind: {n: float(t) for n, t in merged_fisher(new, old, 3, kind, 0.5).items()}
        for kind in ("mean", "sum", "online")
    }
    assert values["mean"] == {"a": 1.75, "b": 0.5, "c": 2.25}
    assert values["sum"] == {"a": 5.0, "b": 2.0, "c": 3.0}
    assert values["online"] == {"a": 4.5, "b": 2.0, "c": 1.5}
    assert merged_fisher(new, {}, 0, "mean", 0.5).keys() == new.keys()


def train(start, folder, *, method=None, seed=1, peft=None, **settings):
    config = ContinualConfig(**toy.settings(folder, **settings))
    trainer = ContinualTrainer(
        start, config, train_dataset=toy.rows(seed=seed), processing_class=toy.tokenizer(), peft_config=peft,
        methods=[method or EWC(weight=100.0)],
    )  # fmt: skip
    trainer.train()
    return trainer


def by_hand(model, rows, size):
    """The Fisher of a model's own rows, computed without the library, in batches of `size` rows."""
    model.eval()
    fisher = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for first in range(0, len(rows), size):
        part = [torch.tensor(r["input_ids"]) for r in rows.select(range(first, min(first + size, len(rows))))]
        model.zero_grad()
        losses = []
        for ids in part:
            logits = model(input_ids=ids[None]).logits[0, :-1]
            losses.append(nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
        torch.cat(losses).mean().backward()
        for name, p in model.named_parameters():
            fisher[name] += len(part) * p.grad**2 / len(rows)
    return fisher


@pytest.mark.parametrize(("kind", "size"), [("batch", 8), ("sample", 1)])
def test_what_is_left_is_the_fisher_of_the_tasks_own_rows(tmp_path, kind, size):
    trainer = train(toy.model(), tmp_path, method=EWC(fisher=kind), gradient_accumulation_steps=2, max_grad_norm=1e-3)
    expected = by_hand(trainer.model, trainer.run.task_rows, size)
    state = trainer.task_states["ewc"]
    assert state["tasks"] == 1
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(state[f"fisher/{name}"], expected[name], rtol=1e-3, atol=1e-9)
        assert torch.equal(state[f"anchor/{name}"], p.detach())


def test_a_limit_of_rows_is_a_seeded_choice(tmp_path):
    found = [
        train(toy.model(), tmp_path, method=EWC(rows=5, batch_rows=5)).task_states["ewc"]["fisher/lm_head.weight"]
        for _ in range(2)
    ]
    everything = train(toy.model(), tmp_path).task_states["ewc"]["fisher/lm_head.weight"]
    assert torch.equal(*found) and not torch.allclose(found[0], everything)


def test_accumulation_changes_neither_the_fisher_nor_the_pull(tmp_path):
    train(toy.model(), tmp_path / "first").save_model()
    found = []
    for size, steps in ((4, 1), (2, 2)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = train(str(tmp_path / "first"), tmp_path / "second", method=EWC(weight=1e5), seed=2, **settings)
        found.append((toy.flat(trainer.model), trainer.task_states["ewc"]["fisher/lm_head.weight"]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2, atol=1e-7)


def test_a_stronger_spring_holds_important_weights_nearer(tmp_path):
    first = train(toy.model(), tmp_path / "first", max_steps=12)
    first.save_model()
    state, before = first.task_states["ewc"], dict(first.model.named_parameters())
    moved = []
    for weight in (0.0, 1e3, 1e6):
        later = train(str(tmp_path / "first"), tmp_path / "later", method=EWC(weight=weight), seed=5, max_steps=12)
        after = {n: p.detach() for n, p in later.model.named_parameters()}
        moved.append(float(penalty(after, {n: p.detach() for n, p in before.items()}, fisher_of(state), 1.0)))
    assert moved[0] > 1.2 * moved[1] > 12 * moved[2], moved


def fisher_of(state):
    return {n.removeprefix("fisher/"): t for n, t in state.items() if n.startswith("fisher/")}


def test_a_new_adapter_is_not_held_to_an_earlier_one(tmp_path, caplog):
    def lora(rank):
        return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")

    base = toy.model()
    base.save_pretrained(tmp_path / "base")
    train(str(tmp_path / "base"), tmp_path / "first", peft=lora(2)).save_model()
    new = train(str(tmp_path / "first"), tmp_path / "new", peft=lora(3), seed=2)
    assert "nothing is held" in caplog.text
    assert all(
        t.shape[0] == 3 for n, t in new.task_states["ewc"].items() if n.startswith("fisher/") and ".lora_A." in n
    )
    again = train(str(tmp_path / "first"), tmp_path / "again", seed=2)
    assert again.task_states["ewc"]["tasks"] == 2


def test_sentences():
    for wrong, said in (
        ({"weight": -1.0}, "must be above 0"),
        ({"fisher": "exact"}, "must be one of batch, sample"),
        ({"over_tasks": "max"}, "must be one of mean, sum, online"),
        ({"decay": 2.0}, "must lie between 0 and 1"),
        ({"rows": 0}, "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            EWC(**wrong)
    run = FakeRun(nn.Linear(2, 3))
    run.is_sharded, run.task_rows = True, []
    with pytest.raises(ValueError, match="needs the gradient of one row on one process.*Use fisher='batch'"):
        EWC(fisher="sample").end_task(run)
    with pytest.raises(ValueError, match=r"1 weights have a different shape.*weight: \(4, 4\) then, \(3, 2\) now"):
        EWC().load_task_state({"tasks": 1, "fisher/weight": torch.ones(4, 4), "anchor/weight": torch.ones(4, 4)}, run)
