"""TaSL: the published importance and merged weights, its LoRA form, and the state of the next task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from hf_continual import ContinualConfig, ContinualTrainer, TaSL
from hf_continual.methods.tasl import accumulate, consolidate, rank_scores, scaled
from hf_continual.methods.tasl.consolidation import orthonormality_gradient, present_rank_shares, present_shares
from hf_continual.tensors.importance import update_importance_
from tests import toy
from tests.methods.fake_run import FakeRun

NUMBERS = Path(__file__).parents[1] / "golden" / "baselines"
GOLDEN = load_file(NUMBERS / "tasl_module_merge.safetensors")
NAMES = json.loads((NUMBERS / "tasl_names.json").read_text())["tasl_names"]

ZERO_TOLERANCE = 0.0
NEEDS_PREDECESSOR = True


def example(world):
    return TaSL(share=0.4)


def zero(world):
    return TaSL(strength=0.0)


def sides():
    return tuple(
        dict(zip(NAMES, GOLDEN[f"raw_importance_{side}"].tolist(), strict=True)) for side in ("present", "previous")
    )


def test_the_published_importance():
    feed = load_file(NUMBERS / "tasl_importance.safetensors")
    names = json.loads((NUMBERS / "tasl_importance_names.json").read_text())
    score = {}
    for name in names["module"]:
        kept = [torch.zeros_like(feed[f"0/param/{name}"]) for _ in range(2)]
        for step in range(1, 5):  # the steps their gate counts
            update_importance_(*kept, feed[f"{step}/param/{name}"], feed[f"{step}/grad/{name}"])
        score[name] = kept[0].double() * kept[1].double()
    means = torch.stack([score[n].mean() for n in names["module"]])
    torch.testing.assert_close(means, feed["module_scores"], rtol=1e-6, atol=0)
    ranks = torch.cat([rank_scores(score[f"{m}.lora_A.weight"], score[f"{m}.lora_B.weight"]) for m in "qv"])
    torch.testing.assert_close(ranks, feed["rank_scores_first"], rtol=1e-6, atol=0)


def test_the_published_consolidation():
    present, previous = sides()
    for side, name in ((present, "present"), (previous, "previous")):
        found = torch.tensor([float(v) for v in scaled(side).values()], dtype=torch.float64)
        torch.testing.assert_close(found, GOLDEN[f"norm_{name}"], rtol=1e-6, atol=1e-9)
    now, then = ({n: GOLDEN[f"w_{s}/{n}"] for n in NAMES} for s in ("present", "previous"))
    for given in ((present, previous), (GOLDEN["raw_importance_present"], GOLDEN["raw_importance_previous"])):
        for name, tensor in consolidate(now, then, *given).items():
            torch.testing.assert_close(tensor, GOLDEN[f"merged/{name}"], rtol=1e-6, atol=1e-7)
    found = torch.tensor([float(v) for v in accumulate(present, previous).values()], dtype=torch.float64)
    torch.testing.assert_close(found, GOLDEN["accumulated_importance"], rtol=1e-6, atol=1e-9)


def test_rules_by_hand():
    """Five units, the top 40 %: thresholds are the third largest, 2 on both sides."""
    importance = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0, "e": 0.0}, {"a": 4.0, "b": 0.0, "c": 3.0, "d": 1.0, "e": 2.0}
    assert present_shares(*importance, share=0.4) == {
        "a": pytest.approx(0.3), "b": 1.0, "c": 0.0, "d": 0.5, "e": 0.5,
    }  # fmt: skip
    assert [v.tolist() for v in scaled({"a": 2.0, "b": 2.0}).values()] == [0.0, 0.0]
    assert accumulate({"a": 3.0, "b": 1.0}, {}) == {"a": 1.0, "b": 0.0}
    ranks = present_rank_shares({"m": torch.tensor([1.0, 0.0])}, {"m": torch.tensor([0.0, 1.0])}, 0.25)
    torch.testing.assert_close(ranks["m"], torch.tensor([0.982014, 0.017986]), rtol=1e-4, atol=0)  # 1 / (1 + e^-+4)
    only = consolidate({"a": torch.ones(2), "new": torch.ones(1)}, {"a": torch.zeros(2)}, [1.0, 2.0], {"a": 1.0})
    assert only["a"].tolist() == [0.5, 0.5] and only["new"].tolist() == [1.0]


def test_the_regulariser_in_closed_form():
    P = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    (P @ P.mT - torch.eye(2, dtype=torch.float64)).norm(dim=(1, 2)).sum().backward()
    torch.testing.assert_close(orthonormality_gradient(P.detach()), P.grad)


def lora(rank=2):
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def train(start, folder, method, *, seed=1, peft=None, **settings):
    trainer = ContinualTrainer(
        start, ContinualConfig(**toy.settings(folder, **settings)), train_dataset=toy.rows(seed=seed),
        processing_class=toy.tokenizer(), peft_config=peft, methods=[method],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture
def base(tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("units", ["tensor", "rank"])
def test_a_second_task_is_mixed_with_the_first(tmp_path, base, units):
    """The weights after the run are a mix of those of a measuring-only run and those the task started from."""
    first = train(base, tmp_path / "0", TaSL(units=units), peft=lora())
    plain = train(base, tmp_path / "plain", TaSL(units=units, strength=0.0), peft=lora())
    assert torch.equal(toy.flat(first.model), toy.flat(plain.model))  # without an earlier task it is plain LoRA
    before = {n: p.detach().clone() for n, p in first.run.named_parameters().items()}
    trained = train(str(tmp_path / "0"), tmp_path / "1", TaSL(units=units, strength=0.0), seed=2)
    mixed = train(str(tmp_path / "0"), tmp_path / "2", TaSL(units=units), seed=2)
    old, new = first.task_states["tasl"]["importance"], trained.task_states["tasl"]["importance"]
    assert new == mixed.task_states["tasl"]["importance"] and new != old and mixed.task_states["tasl"]["tasks"] == 2
    assert max(max(v) if isinstance(v, list) else v for v in old.values()) == 1.0
    after = {n: p.detach() for n, p in trained.run.named_parameters().items()}
    found = {n: p.detach() for n, p in mixed.run.named_parameters().items()}
    sides = (
        {n: (before[n] - found[n]).abs().max() < 1e-7 for n in found},
        {n: torch.equal(after[n], found[n]) for n in found},
    )
    if units == "tensor":
        halves = [n for n in found if torch.allclose(found[n], (before[n] + after[n]) / 2, atol=1e-7)]
        both = [n for n in found if torch.allclose(found[n], 0.7 * before[n] + 0.3 * after[n], atol=1e-7)]
        assert len(halves) + len(both) + sum(sides[0].values()) + sum(sides[1].values()) >= len(found)
        assert len(halves) > len(found) / 2
    else:
        a = next(n for n in found if ".lora_A." in n)
        share = (found[a] - before[a]) / (after[a] - before[a])
        assert share.std(dim=1).max() < 1e-3 and share.min() > 0 and share.max() < 1  # one number for each rank
        b = a.replace("lora_A", "lora_B")
        again = (found[b] - before[b]) / (after[b] - before[b])
        torch.testing.assert_close(again.nanmedian(dim=0).values, share.median(dim=1).values, rtol=0, atol=1e-2)


def test_the_regulariser_acts(tmp_path, base):
    def apart(trainer):
        rows = [p.detach() for n, p in trainer.run.named_parameters().items() if ".lora_A." in n]
        return sum(float((a @ a.T - torch.eye(2)).norm()) for a in rows)

    free, held = (
        apart(train(base, tmp_path / "0", TaSL(orthogonality=w), peft=lora(), max_steps=10, learning_rate=1e-2))
        for w in (0.0, 10.0)
    )
    assert held < 0.9 * free


def test_a_new_adapter_is_not_mixed(tmp_path, base, caplog):
    train(base, tmp_path / "0", TaSL(), peft=lora())
    found = [train(str(tmp_path / "0"), tmp_path / "1", TaSL(strength=s), seed=2, peft=lora(3)) for s in (0.0, 1.0)]
    assert "nothing is mixed" in caplog.text
    assert torch.equal(*(toy.flat(t.model) for t in found))


def test_sentences(tmp_path, base):
    for wrong, said in (
        ({"units": "module"}, "must be one of tensor, rank"),
        ({"share": 0}, "must lie between 0 and 1, 0 excluded"),
        ({"strength": 2}, "must lie between 0 and 1"),
        ({"temperature": 0}, "must be above 0"),
        ({"orthogonality": -1}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=said):
            TaSL(**wrong)
    with pytest.raises(ValueError, match="works on the factors of LoRA adapters, and the model has none"):
        train(base, tmp_path / "full", TaSL(units="rank"))
    run = FakeRun(torch.nn.Linear(2, 3))
    state = {"tasks": 1, "units": "tensor", "shapes": {"weight": [4, 4]}, "importance": {"weight": 1.0}}
    with pytest.raises(ValueError, match=r"1 weights have a different shape.*weight: \(4, 4\) then, \(3, 2\) now"):
        TaSL().load_task_state(state, run)
    with pytest.raises(ValueError, match="Use units='tensor'"):
        TaSL(units="rank").load_task_state(state, run)
    run.is_sharded = True
    with pytest.raises(ValueError, match="needs whole factors, and they are sharded over processes"):
        TaSL(orthogonality=0.1).begin_task(run)
    with pytest.raises(ValueError, match="1 importance values for 2 tensors"):
        consolidate({"a": torch.ones(1), "b": torch.ones(1)}, {}, [1.0], [1.0])
