"""The verdict's rule on scores by hand, and the evidence against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.linalg import subspace_angles

from hf_continual.diagnosis.halves import halves
from hf_continual.diagnosis.line import hump
from hf_continual.diagnosis.models import open_patients
from hf_continual.diagnosis.remedies import bottom, remedies_of
from hf_continual.diagnosis.states import linear_cka
from hf_continual.diagnosis.updates import effective, principal_angles, update_layers
from hf_continual.diagnosis.verdict import judge
from tests import toy


def scores(seed=0, n=200, **right):
    """Right and wrong rows of each model, rows drawn on their own."""
    rng = np.random.default_rng(seed)
    return {name: list((rng.random(n) < share).astype(float)) for name, share in right.items()}


CASES = {
    "spurious": dict(before=0.98, after=0.2, recovered=0.93, base=0.05, control=0.3),
    "real": dict(before=0.98, after=0.2, recovered=0.25, base=0.05, control=0.4),
    "none": dict(before=0.999, after=0.999, recovered=0.999, base=0.05, control=0.3),
    "undecided": dict(before=0.98, after=0.2, recovered=0.55, base=0.05, control=0.4),
}


@pytest.mark.parametrize("verdict", CASES)
def test_each_verdict(verdict):
    found = judge(scores(**CASES[verdict]), taught=1.0)
    assert found.verdict == verdict and found.reason
    assert found.confidence > 0.9 or verdict == "undecided"
    assert found.tests["lost"].difference == pytest.approx(CASES[verdict]["before"] - CASES[verdict]["after"], abs=0.08)


def test_what_cannot_be_concluded_is_undecided_and_says_why():
    spurious = CASES["spurious"]
    few = judge(scores(n=8, before=1, after=0.6, recovered=1, control=0.6), taught=1.0)
    assert few.verdict == "undecided"
    untaught = judge(scores(**spurious), taught=0.5)
    assert untaught.verdict == "undecided" and "more steps or another learning rate" in untaught.reason
    alone = judge({k: v for k, v in scores(**spurious).items() if k not in ("base", "control")}, taught=1.0)
    assert alone.verdict == "undecided" and "without a control" in alone.reason
    known = judge(scores(**{**spurious, "control": 0.97}), taught=1.0)
    assert known.verdict == "undecided" and "can be answered without remembering" in known.reason
    # Without a control it can still be shown that nothing comes back.
    gone = judge(scores(n=400, before=0.98, after=0.02, recovered=0.02), taught=1.0)
    assert gone.verdict == "real"
    known, lost = [1.0] * 54 + [0.0] * 6, [0.0] * 2 + [1.0] * 52 + [0.0] * 6
    small = judge({"before": known, "after": lost, "recovered": known, "control": [0.0] * 60}, taught=1.0)
    assert small.verdict == "undecided" and "More rows would tell" in small.reason


def test_verdicts_are_wrong_as_rarely_as_the_intervals_say():
    """At the border of each rule: a control that is as good, a loss that is the margin, half that came back."""
    wrong = {"spurious": 0, "none": 0}
    for seed in range(40):
        same = scores(seed, before=0.98, after=0.3, recovered=0.8, control=0.8)
        wrong["spurious"] += judge(same, taught=1.0, draws=1).verdict == "spurious"
        lost = scores(seed, before=0.9, after=0.85, recovered=0.85, control=0.2)
        wrong["none"] += judge(lost, taught=1.0, draws=1).verdict == "none"
    assert wrong["spurious"] <= 4 and wrong["none"] <= 4


def test_rows_that_belong_together_stay_together():
    rows = Dataset.from_list([{"prompt": f"q{i}", "completion": "x", "who": f"p{i // 5}"} for i in range(100)])
    shown, held = halves(rows, seed=3, group="who")
    assert len(shown) == len(held) == 50 and not set(shown["who"]) & set(held["who"])
    assert halves(rows, 3, "who")[0]["prompt"] == shown["prompt"] != halves(rows, 4, "who")[0]["prompt"]
    twice = Dataset.from_list([{"prompt": f"q{i % 40}", "completion": str(i)} for i in range(80)])
    shown, held = halves(twice)
    assert not set(shown["prompt"]) & set(held["prompt"])
    with pytest.raises(ValueError, match="have no such column, only prompt, completion, who"):
        halves(rows, group="person")
    with pytest.raises(ValueError, match="100 rows of 1 values of 'who'|halves of 0 and 100"):
        halves(rows.map(lambda _: {"who": "one"}), group="who")


def test_principal_angles_are_scipys():
    g = torch.Generator().manual_seed(0)
    one, two = torch.randn(40, 4, generator=g), torch.randn(40, 4, generator=g)
    left = [m @ torch.randn(4, 30, generator=g) for m in (one, two)]  # rank 4
    expected = np.sort(np.rad2deg(subspace_angles(one.double().numpy(), two.double().numpy())))
    assert np.allclose(principal_angles(*left, rank=4).numpy(), expected, atol=1e-3)
    assert principal_angles(left[0], 3 * left[0], rank=4).max() < 1e-2
    assert principal_angles(left[0], torch.zeros(40, 30)).numel() == 0
    large = [m @ torch.randn(4, 200, generator=g) for m in (torch.randn(300, 4, generator=g) for _ in range(2))]
    exact = np.sort(np.rad2deg(subspace_angles(*(torch.linalg.svd(m.double())[0][:, :4].numpy() for m in large))))
    assert np.allclose(principal_angles(*large, rank=4).numpy(), exact, atol=1e-3)  # by the randomised SVD


def test_cka_is_the_formula_and_is_not_fooled_by_few_samples():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(50, 20))
    turn = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    assert linear_cka(states, 3 * states @ turn + 5) == pytest.approx(1.0)
    unrelated = [linear_cka(rng.normal(size=(20, 500)), rng.normal(size=(20, 500))) for _ in range(200)]
    assert abs(np.mean(unrelated)) < 0.02  # the biased estimate is 0.96 there
    assert linear_cka(states[:3], states[:3]) is None and linear_cka(np.ones((9, 4)), states[:9, :4]) is None
    # Song et al.'s sum over index tuples that differ, by hand.
    one, two = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))

    def hsic(a, b):
        a, b = ((x - x.mean(0)) @ (x - x.mean(0)).T for x in (a, b))
        total, n = 0.0, 6
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    for m in range(n):
                        if len({i, j, k, m}) == 4:
                            total += a[i, j] * (b[i, j] + b[k, m] - 2 * b[i, k])
        return total / (n * (n - 1) * (n - 2) * (n - 3))

    assert linear_cka(one, two) == pytest.approx(hsic(one, two) / np.sqrt(hsic(one, one) * hsic(two, two)))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "modules_to_save": ["lm_head"]}])
def test_a_weight_with_an_adapter_is_what_peft_computes_with(options, tmp_path):
    toy.model().save_pretrained(tmp_path / "base")
    live = get_peft_model(toy.model(), LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", **options))
    with torch.no_grad():
        for name, p in live.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))).abs() / 4)
    live.save_pretrained(tmp_path / "adapter")
    patients = open_patients(tmp_path / "base", tmp_path / "adapter")
    merged = PeftModel.from_pretrained(toy.model(), tmp_path / "adapter").merge_and_unload()
    expected = dict(merged.named_parameters())
    names = patients.after.names
    assert set(expected) <= set(names)
    for name in names:
        assert torch.allclose(effective(patients.after, name), expected[name], atol=1e-5), name


def test_the_layers_of_an_update(tmp_path):
    models = [toy.model(), toy.model(), toy.model()]
    with torch.no_grad():
        models[1].model.layers[1].mlp.up_proj.weight[:, 0] += 1.0
        models[2].load_state_dict(models[1].state_dict())
        models[2].model.layers[1].mlp.up_proj.weight[:, 3] += 1.0  # the same column space
        models[2].model.layers[2].mlp.up_proj.weight[0] += 2.0
    for name, model in zip(("base", "before", "after"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    patients = open_patients(tmp_path / "before", tmp_path / "after", tmp_path / "base")
    found = {e["layer"]: e for e in update_layers(patients.before, patients.after, patients.base)}
    assert list(found) == ["embed", "layer.0", "layer.1", "layer.2", "layer.3", "final"]
    assert found["layer.0"]["size"] == 0 and found["layer.0"]["angle"] is None
    assert found["layer.1"]["angle"] == pytest.approx(0, abs=0.1) and found["layer.2"]["angle"] is None
    weights = [p for n, p in models[1].named_parameters() if ".layers.2." in n]
    norm = torch.cat([w.detach().flatten() for w in weights]).norm()
    assert found["layer.2"]["size"] == pytest.approx(float(2 * 32**0.5 / norm), rel=1e-4)


def test_remedies_by_hand():
    assert hump([1.0, 3.0, 2.0], (0.0, 0.5, 1.0)) == 1.5 and hump([1.0, 1.2, 2.0], (0.0, 0.5, 1.0)) == 0.0
    layers = [
        {"layer": "embed", "cka": 0.99},
        *({"layer": f"layer.{i}", "cka": c} for i, c in enumerate((0.9, 0.4, 0.3, 0.2))),
    ]
    assert bottom(layers) == (2, 4)
    named = {"before": "b", "after": "a", "rows": "old.jsonl", "below": ""}
    settings = {"shown": 30, "steps": 20, "learning_rate": 1e-4, "batch_size": 8}
    line = [{"share": s, "score": v} for s, v in ((0, 1.0), (0.5, 0.8), (1, 0.3))]

    def commands(verdict, line=line):
        judged = judge(scores(**CASES[verdict]), taught=1.0)
        return [r.command for r in remedies_of(judged, named, layers, line, settings)]

    assert commands("none") == []
    spurious = commands("spurious")
    assert "train --model a --train old.jsonl --steps 20 --set learning_rate=0.0001" in spurious[0]
    assert "{freeze: {bottom: 2}}" in spurious[1] and "merge linear b a --weights 0.5,0.5" in spurious[2]
    assert len(commands("real")) == 2 and "replay: {rows: old.jsonl" in commands("real", [])[0]
    assert "replay" in commands("undecided")[0]
