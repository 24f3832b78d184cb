"""Averages of full models: every family, every layout; interpolation, task arithmetic, TIES, magnitude-max on the engine."""

from __future__ import annotations

import filecmp
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_continual import interpolate, magnitude_max, merge_linear, scan_alpha, task_arithmetic, ties
from hf_continual.merging.engine.threshold import kth_largest
from tests.merging.world import CONFIGS, build, digest, family, logits, save, tensors, tuned

TIED = {"llama tied", "qwen", "gemma", "gpt2"}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_loads_and_runs(tmp_path, name):
    _, a, b = family(tmp_path, name)
    result = merge_linear([a, b], tmp_path / "out", weights=[3, 1], max_shard_size="40KB")
    assert result.kind == "model" and result.report["options"]["weights"] == [0.75, 0.25]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    one, two = (AutoModelForCausalLM.from_pretrained(m) for m in (a, b))
    for p, q, r in zip(merged.parameters(), one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, 0.75 * q + 0.25 * r, rtol=0, atol=1e-6)
    assert torch.isfinite(logits(merged)).all()
    assert ("lm_head.weight" in tensors(tmp_path / "out")) == (name not in TIED)
    assert merged.config.tie_word_embeddings == (name in TIED)
    for file in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert filecmp.cmp(
            b / file if "token" in file or "chat" in file else a / file, tmp_path / "out" / file, shallow=False
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_rounded_once(tmp_path, dtype):
    _, a, b = family(tmp_path, dtype=dtype)
    merge_linear([a, b], tmp_path / "out", weights=[0.3, 0.7])
    one, two, merged = tensors(a), tensors(b), tensors(tmp_path / "out")
    for name in one:
        first, second = one[name].float(), two[name].float()
        assert torch.equal(merged[name], torch.add(first, second - first, alpha=0.7).to(dtype)), name


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_equal_models_give_their_own_bytes(tmp_path, layout):
    options = {"max_shard_size": "30KB"} if layout == "sharded" else {}
    base = build(dtype=torch.bfloat16)
    for name in ("a", "b", "c"):
        save(base, tmp_path / name, **options)
    with pytest.warns(UserWarning, match="a and b and c are the same weights"):
        merge_linear([tmp_path / n for n in "abc"], tmp_path / "out", weights=[0.2, 0.3, 0.5])
    one, out = tensors(tmp_path / "a"), tensors(tmp_path / "out")
    assert (
        all(torch.equal(one[n].view(torch.uint8), out[n].view(torch.uint8)) for n in one) and one.keys() == out.keys()
    )


def test_one_model_alone_comes_out_as_it_went_in(tmp_path):
    _, a, _ = family(tmp_path)
    with pytest.warns(UserWarning, match="m1 is the only model: the output is a copy of it. Name a second model"):
        merge_linear([a], tmp_path / "out")
    one, out = tensors(a), tensors(tmp_path / "out")
    assert one.keys() == out.keys() and all(torch.equal(one[n], out[n]) for n in one)


def test_shards_have_a_true_index(tmp_path):
    _, a, b = family(tmp_path)
    result = merge_linear([a, b], tmp_path / "out", max_shard_size="30KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {n: t for p in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(p).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in stored.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert digest(tmp_path / "out") == {n: f["xxh3_128"] for n, f in result.report["files"].items()}


def test_types_may_differ_and_the_first_decides(tmp_path):
    base = build()
    a, b = save(tuned(base, 1).to(torch.bfloat16), tmp_path / "a"), save(tuned(base, 2), tmp_path / "b")
    result = merge_linear([a, b], tmp_path / "out")
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert any("different dtypes" in note for note in result.report["notes"])
    merge_linear([a, b], tmp_path / "wide", dtype="float32")
    assert {t.dtype for t in tensors(tmp_path / "wide").values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").config.dtype == torch.float32


def test_float64_is_computed_in_float64(tmp_path):
    base = build(dtype=torch.float64)
    a, b = save(tuned(base, 1), tmp_path / "a"), save(tuned(base, 2), tmp_path / "b")
    merge_linear([a, b], tmp_path / "out", weights=[1, 2])
    one, two, merged = tensors(a), tensors(b), tensors(tmp_path / "out")
    for name in one:
        torch.testing.assert_close(merged[name], (one[name] + 2 * two[name]) / 3, rtol=0, atol=1e-15)


def test_integers_must_be_equal_and_are_copied(tmp_path):
    _, a, b = family(tmp_path)
    for folder in (a, b):
        save_file(
            {**load_file(folder / "model.safetensors"), "model.counter": torch.arange(5)},
            folder / "model.safetensors",
            {"format": "pt"},
        )
    merge_linear([a, b], tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["model.counter"], torch.arange(5))
    save_file(
        {**load_file(b / "model.safetensors"), "model.counter": torch.arange(5) + 1},
        b / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        RuntimeError, match=r"'model.counter' \(I64\) cannot be averaged and differs between .*m1 and .*m2"
    ):
        merge_linear([a, b], tmp_path / "other")


def test_interpolation_and_its_ends(tmp_path):
    base, a, _ = family(tmp_path)
    for alpha in (0.0, 0.25, 1.0, 1.5):
        interpolate(base, a, tmp_path / f"at{alpha}", alpha=alpha)
    start, end = tensors(base), tensors(a)
    for name, value in tensors(tmp_path / "at0.25").items():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * end[name], rtol=0, atol=2e-7)
    assert all(torch.equal(v, start[n]) for n, v in tensors(tmp_path / "at0.0").items())
    for name, value in tensors(tmp_path / "at1.0").items():
        torch.testing.assert_close(value, end[name], rtol=0, atol=2e-8)
    with pytest.raises(ValueError, match="alpha=inf"):
        interpolate(base, a, tmp_path / "no", alpha=float("inf"))


def test_a_scan_keeps_the_best_and_goes_on(tmp_path):
    base, a, _ = family(tmp_path)
    start, end = tensors(base)["model.norm.weight"], tensors(a)["model.norm.weight"]
    asked = []

    def distance(folder):
        alpha = float(((tensors(folder)["model.norm.weight"] - start) / (end - start)).mean())
        asked.append(round(alpha, 3))
        if len(asked) == 3:
            raise RuntimeError("interrupted")
        return abs(alpha - 0.7)

    with pytest.raises(RuntimeError, match="interrupted"):
        scan_alpha(base, a, tmp_path / "best", distance, lower_is_better=True)
    result, scores = scan_alpha(base, a, tmp_path / "best", distance, lower_is_better=True)
    assert asked == [0.0, 0.25, 0.5, 0.5, 0.75, 1.0] and min(scores, key=scores.__getitem__) == 0.75
    assert result.report["options"]["alpha"] == 0.75
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "best", "m1", "m2"]


def test_a_scan_does_not_mix_measurements(tmp_path):
    """Measurements of a scan with other options are not reused; a dry run measures nothing."""
    base, a, _ = family(tmp_path)
    asked = []

    def interrupted(folder):
        asked.append(folder)
        if len(asked) == 3:
            raise RuntimeError("interrupted")
        return 0.0

    with pytest.raises(RuntimeError, match="interrupted"):
        scan_alpha(base, a, tmp_path / "best", interrupted, dtype="bfloat16")
    result, scores = scan_alpha(base, a, tmp_path / "plan", interrupted, dry_run=True)
    assert scores == {} and not (tmp_path / "plan").exists() and len(asked) == 3 and result.kind == "model"
    scan_alpha(base, a, tmp_path / "best", lambda folder: asked.append(folder) or 1.0)
    assert len(asked) == 3 + 5


def test_task_arithmetic_adds_and_subtracts(tmp_path):
    base, a, b = family(tmp_path)
    task_arithmetic([a, b], tmp_path / "out", base=base, scale=[0.4, -0.3])
    zero, one, two = tensors(base), tensors(a), tensors(b)
    for name, value in tensors(tmp_path / "out").items():
        wanted = zero[name] + 0.4 * (one[name] - zero[name]) - 0.3 * (two[name] - zero[name])
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="has 1 numbers for 2 models"):
        task_arithmetic([a, b], tmp_path / "no", base=base, scale=[0.4])


def flat(folder, like):
    stored = tensors(folder)
    return torch.cat([stored[n].flatten() for n in like])


def test_ties_trims_elects_and_averages(tmp_path):
    base, a, b = family(tmp_path)
    c = save(tuned(AutoModelForCausalLM.from_pretrained(base), 3), tmp_path / "m3")
    result = ties([a, b, c], tmp_path / "out", base=base, density=0.2, scale=0.9)
    names = list(tensors(base))
    zero = flat(base, names)
    changes = [flat(m, names) - zero for m in (a, b, c)]
    trimmed = []
    for change, threshold in zip(changes, result.report["thresholds"], strict=True):
        kth = change.abs().sort(descending=True).values[round(0.2 * len(change)) - 1]
        assert threshold == kth.item()
        trimmed.append(torch.where(change.abs() >= kth, change, 0.0))
    sign = sum(trimmed).sign()
    agreeing = [torch.where((t.sign() == sign) & (t != 0), t, 0.0) for t in trimmed]
    count = sum((t != 0).float() for t in agreeing).clamp(min=1)
    torch.testing.assert_close(flat(tmp_path / "out", names), zero + 0.9 * sum(agreeing) / count, rtol=0, atol=2e-7)
    with pytest.raises(ValueError, match=r"density=1.5"):
        ties([a, b], tmp_path / "no", base=base, density=1.5)


def test_magnitude_max_keeps_the_largest_change(tmp_path):
    base, a, b = family(tmp_path)
    magnitude_max([a, b], tmp_path / "out", base=base, scale=0.5)
    names = list(tensors(base))
    zero = flat(base, names)
    one, two = flat(a, names) - zero, flat(b, names) - zero
    wanted = zero + 0.5 * torch.where(two.abs() > one.abs(), two, one)
    assert torch.equal(flat(tmp_path / "out", names), wanted)


@pytest.mark.parametrize("kth", [1, 2, 333, 9_999, 10_000, 20_000])
def test_the_streamed_kth_largest_is_exact(kth):
    torch.manual_seed(kth)
    numbers = torch.cat([torch.randn(9_000).abs(), torch.zeros(500), torch.full((500,), 0.25)])
    found = kth_largest(lambda: numbers.split(777), kth)
    assert found == numbers.sort(descending=True).values[min(kth, 10_000) - 1].item()
