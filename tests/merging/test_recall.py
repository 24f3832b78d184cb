"""RECALL's maths against the golden numbers and by their properties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_continual.merging.engine.average import Average
from hf_continual.merging.engine.lora import concatenated, truncated
from hf_continual.merging.methods.recall.similarity import layer_weights
from hf_continual.merging.methods.recall.typical_samples import typical_samples

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "recall" / "recall_golden.npz")
CASES = {
    "default": {},
    "T05": {"temperature": 0.5},
    "dim": {"bandwidth": "dim"},
    "sigma1": {"bandwidth": 1.0},
    "kernel_of_mean": {"aggregate": "kernel_of_mean"},
    "all_pairs": {"reference": "all_pairs"},
}
R = GOLDEN["R"]


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_the_golden_numbers(case):
    found = layer_weights(R, anchor=2, **CASES[case])
    np.testing.assert_allclose(found["sigma2"], GOLDEN[f"{case}.sigma2"], rtol=1e-12)
    np.testing.assert_allclose(found["similarity"], GOLDEN[f"{case}.sim"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["weights"], GOLDEN[f"{case}.w"], rtol=0, atol=1e-12)


def test_fp32_representations_give_the_golden_weights_to_1e_6():
    found = layer_weights(R.astype(np.float32), anchor=-1)
    np.testing.assert_allclose(found["weights"], GOLDEN["default.w"], rtol=0, atol=1e-6)


def test_one_sample_falls_back_to_the_dimension():
    found = layer_weights(R[:, :, :1], anchor=2)
    np.testing.assert_allclose(found["sigma2"], GOLDEN["one_sample.sigma2"], rtol=1e-12)
    np.testing.assert_allclose(found["weights"], GOLDEN["one_sample.w"], rtol=0, atol=1e-12)


def test_typical_samples_equal_the_golden_rows():
    assert (
        typical_samples(GOLDEN["km.X"], int(GOLDEN["km.k"]), int(GOLDEN["km.seed"])).tolist()
        == GOLDEN["km.typical"].tolist()
    )


def test_merged_tensors_equal_the_golden_numbers():
    for name, group in zip(GOLDEN["param_names"], GOLDEN["param_group"], strict=True):
        halves = [torch.from_numpy(GOLDEN[f"in{q}/{name}"]) for q in range(3)]
        weights = tuple(GOLDEN["default.w"][:, group].tolist())
        merged = Average(weights)([h.flatten().float() for h in halves])
        wanted = torch.from_numpy(GOLDEN[f"merged64/{name}"]).flatten()
        bound = 2**-22 * max(h.abs().max().item() for h in halves)
        assert (merged.double() - wanted).abs().max() <= bound
        rounded = torch.from_numpy(GOLDEN[f"merged16/{name}"]).flatten()
        ulps = (merged.half().view(torch.int16).int() - rounded.view(torch.int16).int()).abs()
        assert ulps.max() <= 1 and (ulps > 0).float().mean() < 0.01


def test_lora_sum_and_truncation_equal_the_golden_numbers():
    weights = (GOLDEN["lora.w"] * GOLDEN["lora.scale"]).tolist()
    a = [torch.from_numpy(GOLDEN[f"lora.A{i}"]) for i in range(2)]
    b = [torch.from_numpy(GOLDEN[f"lora.B{i}"]) for i in range(2)]
    big_a, big_b = concatenated(weights, a, b)
    np.testing.assert_allclose(big_a, GOLDEN["lora.cat_A"], atol=1e-14)
    np.testing.assert_allclose(big_b, GOLDEN["lora.cat_B"], atol=1e-14)
    np.testing.assert_allclose(big_b @ big_a, GOLDEN["lora.delta"], atol=1e-12)
    small_a, small_b, error = truncated(big_a, big_b, 3)
    np.testing.assert_allclose(small_b @ small_a, GOLDEN["lora.svd_r3_delta"], atol=1e-12)
    values = GOLDEN["lora.singular_values"]
    assert error == pytest.approx(np.linalg.norm(values[3:]) / np.linalg.norm(values), rel=1e-12)


def random_reps(seed=0, models=3):
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.standard_normal((models, 4, 5, 7)) * np.array([1.0, 3.0, 10.0, 50.0])[None, :, None, None]


@pytest.mark.parametrize(("models", "temperature"), [(2, 1.0), (3, 1.0), (5, 1.0), (3, 0.3)])
def test_the_anchor_has_the_largest_weight_within_its_bounds(models, temperature):
    found = layer_weights(random_reps(models=models), anchor=1, temperature=temperature)["weights"]
    e = np.exp(1 / temperature)
    assert np.allclose(found.sum(axis=0), 1) and (found[1] >= found.max(axis=0) - 1e-15).all()
    assert (found[1] >= 1 / models - 1e-15).all() and (found[1] <= e / (e + models - 1) + 1e-15).all()
    assert (found > 1 / (1 + (models - 1) * e) - 1e-15).all()


def test_equal_models_get_equal_weights():
    reps = np.repeat(random_reps()[:1], 4, axis=0)
    np.testing.assert_array_equal(layer_weights(reps)["weights"], 0.25)


def test_other_models_may_change_places():
    reps = random_reps()
    here = layer_weights(reps, anchor=2)["weights"]
    there = layer_weights(reps[[1, 0, 2]], anchor=2)["weights"]
    np.testing.assert_allclose(here[[1, 0, 2]], there, atol=1e-15)


def test_the_scale_of_a_layer_does_not_matter_for_anchor_spread_alone():
    reps = random_reps()
    scaled = reps * np.array([0.1, 7.0, 1.0, 3.0])[None, :, None, None]
    np.testing.assert_allclose(layer_weights(reps)["weights"], layer_weights(scaled)["weights"], atol=1e-12)
    assert (
        np.abs(
            layer_weights(reps, bandwidth="dim")["weights"] - layer_weights(scaled, bandwidth="dim")["weights"]
        ).max()
        > 1e-3
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"anchor": 3}, "anchor=3 is out of range for 3 models"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"bandwidth": -1.0}, "bandwidth=-1.0"),
        ({"bandwidth": "median"}, "bandwidth='median'"),
    ],
)
def test_impossible_choices_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        layer_weights(random_reps(), **options)
    with pytest.raises(ValueError, match=r"reps has shape \(3, 4\)"):
        layer_weights(np.ones((3, 4)))


def test_an_average_of_equal_values_changes_no_bit():
    value = torch.randn(1000)
    assert torch.equal(Average((0.1, 0.2, 0.7))([value.clone() for _ in range(3)]), value)
