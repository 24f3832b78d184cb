"""DELLA, Consensus Merging and FAPM: their papers' arithmetic by hand, through files, and independent of chunking."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_continual import merge
from hf_continual.merging.engine import chunks
from hf_continual.merging.engine.chunks import Chunk
from hf_continual.merging.engine.dropping import bits_at
from hf_continual.merging.engine.room import Room
from hf_continual.merging.methods.consensus import AddConsensus
from hf_continual.merging.methods.dare import DropElectMerge
from hf_continual.merging.methods.della import PruneElectFuse, chances, in_order, pruned
from hf_continual.merging.methods.fapm import AddBest, scores
from tests.merging.world import adapter, build, digest, family, save
from tests.merging.world import tensors as all_weights


def at(values, shape=None, name="w", start=0):
    numel = values[0].numel()
    return Chunk(name, shape or (numel,), start, start + numel, start, values)


def vectors(*rows):
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


class TestDella:
    def test_ranks_by_hand(self):
        change = torch.tensor([3.0, -1, 2, 0, 0.5, -0.5, 0.5, 9])
        assert in_order(change, 4, Room()).tolist() == [
            [3, 1, 2, 0],
            [4, 5, 6, 7],
        ]  # among equal magnitudes the later is higher
        assert in_order(change, 8, Room()).tolist() == [[3, 4, 5, 6, 1, 2, 0, 7]]
        assert in_order(change.double(), 1, Room()).tolist() == [[i] for i in range(8)]

    def test_chances_by_hand(self):
        assert chances(5, 0.5, 0.4).tolist() == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
        assert chances(1, 0.5, 0.4).tolist() == [0.5] and chances(3, 0.2, 0.0).tolist() == [0.2] * 3
        assert chances(1000, 0.3, 0.14).mean() == pytest.approx(0.3)

    def test_what_is_kept_by_hand(self):
        change = [0.5, -3.0, 2.0, 1.0, -4.0]
        chance = {0.5: 0.3, 1.0: 0.4, 2.0: 0.5, 3.0: 0.6, 4.0: 0.7}
        bits = bits_at(3, 1, "w", 0, 5) / 2**32
        wanted = [c / chance[abs(c)] if bit < chance[abs(c)] else 0.0 for c, bit in zip(change, bits, strict=True)]
        got = pruned(torch.tensor(change), 0.5, 0.4, 3, 1, at(vectors(change)))
        assert got.tolist() == pytest.approx(wanted) and 0 < sum(w != 0 for w in wanted) < 5

    def test_the_expectation_is_the_change(self):
        change = torch.tensor([0.1, -0.4, 0.2, -0.3]).repeat(100_000)
        got = pruned(change.clone(), 0.3, 0.2, 0, 0, at([change], (100_000, 4))).reshape(-1, 4)
        shares = (got != 0).double().mean(0)
        assert shares.tolist() == pytest.approx([0.2, 0.4, 0.2 + 0.2 / 3, 0.4 - 0.2 / 3], abs=0.01)
        assert got.mean(0).tolist() == pytest.approx([0.1, -0.4, 0.2, -0.3], abs=0.01)

    def test_without_a_width_it_is_dare_ties(self):
        rows = torch.randn(3, 4096)
        one = PruneElectFuse(0.3, 0.0, 0.7, 5)(list(rows.clone()), at(list(rows), (16, 256)))
        two = DropElectMerge(0.3, 0.7, 5)(list(rows.clone()), at(list(rows), (16, 256)))
        assert torch.allclose(one, two, rtol=1e-6, atol=1e-6)

    def test_rows_are_never_cut(self, tmp_path, monkeypatch):
        """Rows longer than a chunk, rows that do not divide one, and vectors."""
        monkeypatch.setattr(chunks, "CHUNK", chunks._STEP)
        monkeypatch.setattr(chunks, "BLOCK", 2 * chunks._STEP)
        monkeypatch.setattr(chunks, "_STEP", 64)
        base, a, b = family(tmp_path, intermediate_size=5000, num_hidden_layers=1)
        seen = []
        real = PruneElectFuse.__call__
        monkeypatch.setattr(
            PruneElectFuse,
            "__call__",
            lambda self, v, at: (seen.append((at.shape, at.start, at.stop)), real(self, v, at))[1],
        )
        merge("della", [a, b], tmp_path / "out", base=base)
        assert all(start % shape[-1] == 0 and stop % shape[-1] == 0 for shape, start, stop in seen)
        assert {shape for shape, *_ in seen} >= {(32, 5000), (5000, 32), (32,)}
        assert sum(shape == (32, 5000) for shape, *_ in seen) == 32


class TestConsensus:
    def test_by_hand(self):
        """Columns: two agree; selfish; catastrophic; opposed; nothing."""
        rows = [5.0, 5, 5, 5, 5], [6.0, 6, 5.1, 6, 5], [6.0, 5, 5.1, 4, 5], [5.0, 5, 5.1, 5, 5]

        def rule(agree):
            values = vectors(*rows)
            return AddConsensus(0.5, (0.6, 0.6, 0.6), agree)(values, at(values)).tolist()

        # 1 > 0.6 * 1 twice; 1 > 0 once; 0.1 > 0.6 * 0.2 never; 1 > 0.6 * 1 twice, of a sum of 0
        assert rule(2) == pytest.approx([6.0, 5, 5, 5, 5])
        assert rule(1) == pytest.approx([6.0, 5.5, 5, 5, 5])

    def test_one_selectivity_each(self):
        values = vectors([0.0, 0], [1.0, 1], [0.5, 2])
        # first: 1 > 1.5 * 0.5, and 1 > 1.5 * 2 is wrong; second: 0.5 > 0.4 * 1, 2 > 0.4 * 1
        assert AddConsensus(1.0, (1.5, 0.4), 2)(values, at(values)).tolist() == [1.5, 0.0]


class TestFAPM:
    def test_scores_by_hand(self):
        base, change = vectors([1.0, -2, 0.5, 0, 4], [0.2, 0.1, 0.3, 0.5, -0.1])
        assert float(base.abs().mean()) == 1.5
        assert scores(change, base, 1.5, torch.empty(5), Room()).tolist() == pytest.approx(
            [-0.1, 0.025, -0.6, -math.inf, 0.0625]
        )
        zeros = torch.zeros(2)
        assert scores(zeros, zeros, 1.0, torch.empty(2), Room()).tolist() == [-math.inf] * 2

    def test_what_is_kept_by_hand(self):
        for threshold, kept in ((0.02, [0, 1, 0, 0, 1]), (-0.2, [1, 1, 0, 0, 1]), (-math.inf, [1] * 5)):
            base, change = vectors([1.0, -2, 0.5, 0, 4], [0.2, 0.1, 0.3, 0.5, -0.1])
            wanted = base + 2.0 * change * torch.tensor(kept)
            values = [base, base + change]
            assert AddBest(1.5, (threshold,), (2.0,))(values, at(values)).tolist() == pytest.approx(wanted.tolist())

    @pytest.mark.parametrize("density", [0.1, 0.7])
    def test_on_models(self, tmp_path, density):
        """The same through files, by sorting; for 0.7 the threshold is below zero."""
        base, a, b = family(tmp_path)
        merge("fapm", [a, b], tmp_path / "out", base=base, density=density, scale=[1.0, 0.5])
        got, zero, signs = all_weights(tmp_path / "out"), all_weights(base), []
        for name, z in zero.items():
            wanted = z.double()
            for other, scale in ((a, 1.0), (b, 0.5)):
                change = all_weights(other)[name] - z
                score = (change.abs().double() * (1 - z.abs().double().mean() / z.abs().double())).flatten()
                threshold = score.sort(descending=True).values[max(1, round(density * z.numel())) - 1]
                signs.append(float(threshold.sign()))
                kept = score.reshape(z.shape) >= threshold - 1e-9
                wanted = wanted + scale * torch.where(kept, change.double(), 0.0)
            assert torch.allclose(got[name].double(), wanted, atol=1e-6), name
        assert set(signs) == {1.0} if density == 0.1 else -1.0 in signs

    def test_tensors_that_hardly_change(self, tmp_path):
        """An adapter changes few tensors; zeros in the base and zero changes lose nothing."""
        base = build()
        with torch.no_grad():
            base.model.layers[0].self_attn.q_proj.weight[:4] = 0.0
        save(base, tmp_path / "base")
        one = adapter(base, tmp_path / "a", 1)
        report = merge("fapm", [one], tmp_path / "out", base=tmp_path / "base").report
        assert report["tensors_with_thresholds"] == 6
        before, after = all_weights(tmp_path / "base"), all_weights(tmp_path / "out")
        for name, z in before.items():
            share = float((after[name] != z).double().mean())
            assert share == (pytest.approx(0.1, abs=2e-3) if "q_proj" in name or "v_proj" in name else 0.0), name
        q = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(after[q][:4], before[q][:4])


@pytest.mark.parametrize("name", ["della", "consensus", "fapm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_it_is_cut_into_it_gives_the_same_bytes(tmp_path, monkeypatch, name, dtype):
    base, a, b = family(tmp_path, dtype=dtype, hidden_size=96, intermediate_size=200)
    merge(name, [a, b], tmp_path / "whole", base=base)
    monkeypatch.setattr(chunks, "CHUNK", chunks._STEP)
    monkeypatch.setattr(chunks, "BLOCK", 2 * chunks._STEP)
    merge(name, [a, b], tmp_path / "pieces", base=base)
    assert digest(tmp_path / "whole") == digest(tmp_path / "pieces")
    merge(name, [a, b], tmp_path / "files", base=base, max_shard_size="60KB")
    whole, files = all_weights(tmp_path / "whole"), all_weights(tmp_path / "files")
    assert all(torch.equal(whole[n], files[n]) for n in whole)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("della", {"density": 0.05, "epsilon": 0.2}, r"density=0.05 and epsilon=0.2: .*-0.05.*Give a smaller epsilon"),
        ("della", {"density": 1.0, "epsilon": 0.1}, "epsilon=0.1: .* at most 1"),
        ("consensus", {"agree": 3}, r"agree=3 of 2 models: nothing would be kept. Give at most 2"),
        ("consensus", {"agree": 0}, r"consensus\(agree=0\) must be at least 1 \(models\)"),
        ("consensus", {"selectivity": [0.4]}, r"selectivity=\[0.4\] has 1 numbers for 2 models"),
        ("consensus", {"selectivity": 0.0}, r"selectivity=\[0.0, 0.0\]: it must be above 0"),
        ("fapm", {"density": 0.0}, r"fapm\(density=0.0\) must lie between 0 and 1"),
        ("fapm", {"scale": [1.0]}, r"scale=\[1.0\] has 1 numbers for 2 models"),
    ],
)
def test_sentences(tmp_path, method, options, said):
    base, a, b = family(tmp_path)
    with pytest.raises(ValueError, match=said):
        merge(method, [a, b], tmp_path / "out", base=base, **options)
    assert not (tmp_path / "out").exists()


def test_della_draws_each_model_and_tensor_anew():
    marks = [bits_at(0, p, t, 0, 50_000) / 2**32 for p, t in ((0, "a"), (1, "a"), (0, "b"))]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(marks[i], marks[j])[0, 1]) < 5 / math.sqrt(50_000)
