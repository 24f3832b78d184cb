"""Merges of the table: their papers' arithmetic by hand, independence of chunking, a custom rule, the same call again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_continual import Paper, dare, dare_ties, kif_fuse, merge, merge_with_recall, scan_alpha, slerp, ties
from hf_continual.merging.engine import chunks
from hf_continual.merging.engine.chunks import Chunk
from hf_continual.merging.engine.dropping import kept_at
from hf_continual.merging.engine.task_vectors import cosine
from hf_continual.merging.methods.base import MergeMethod, Models
from hf_continual.merging.methods.breadcrumbs import AddBand
from hf_continual.merging.methods.dare import DropAndAdd, DropElectMerge
from hf_continual.merging.methods.model_stock import share
from hf_continual.merging.methods.slerp import arc
from hf_continual.merging.methods.table import MERGES, merge_class
from tests.merging.world import adapter, build, digest, family, save


def at(values, name="w"):
    return Chunk(name, (len(values[0]),), 0, len(values[0]), 0, values)


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def all_weights(folder):
    return {k: t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}


class TestDare:
    def test_what_is_kept_by_hand(self):
        values = tensors([1.0, 2, 3, 4], [3.0, 2, 5, 0])
        kept = kept_at(7, 0, "w", 0, 4, 0.5)
        wanted = torch.tensor([1.0, 2, 3, 4]) + 0.5 * torch.tensor([2.0, 0, 2, -4]) * torch.from_numpy(kept) / 0.5
        assert torch.equal(DropAndAdd(0.5, (0.5,), 7)(values, at(values)), wanted)

    def test_all_kept_is_task_arithmetic(self):
        values = tensors([1.0, 2], [3.0, 1], [0.0, 4])
        assert torch.equal(DropAndAdd(1.0, (0.5, 0.25))(values, at(values)), torch.tensor([1.75, 2.0]))

    @pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9])
    def test_the_share_and_that_nothing_repeats(self, density):
        """The fraction within 5 standard deviations, no correlation of neighbours, models, tensors or seeds."""
        n = 400_000
        marks = [kept_at(s, p, t, 0, n, density) for s, p, t in ((0, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 0, "a"))]
        noise = math.sqrt(density * (1 - density) / n)
        for mark in marks:
            assert abs(mark.mean() - density) < 5 * noise
            assert abs(np.corrcoef(mark[:-1], mark[1:])[0, 1]) < 5 / math.sqrt(n)
        for i, j in ((0, 1), (0, 2), (0, 3)):
            assert abs(np.corrcoef(marks[i], marks[j])[0, 1]) < 5 / math.sqrt(n)

    def test_a_range_is_a_part_of_the_whole(self):
        whole = kept_at(3, 1, "w", 0, 10_000, 0.3)
        assert np.array_equal(kept_at(3, 1, "w", 1234, 5678, 0.3), whole[1234:5678])
        far = 2**32 + 5
        assert np.array_equal(kept_at(3, 1, "w", far, far + 9, 0.3), kept_at(3, 1, "w", far - 4, far + 9, 0.3)[4:])
        assert not np.array_equal(kept_at(3, 1, "w", 0, 10_000, 0.3), kept_at(3, 1, "w", 2**32, 2**32 + 10_000, 0.3))

    def test_elected_after_the_drop(self):
        values = tensors([0.0, 0, 0], [1.0, 1, -2], [3.0, -2, -4])
        merged = DropElectMerge(1.0, 2.0)(values, at(values))
        assert torch.equal(merged, torch.tensor([4.0, -4.0, -6.0]))  # means 2, -2 (signs: -1), -3; times 2

    def test_the_expectation_is_the_change(self):
        base, moved = torch.zeros(300_000), torch.full((300_000,), 0.5)
        values = [base, moved]
        assert abs(float(DropAndAdd(0.1, (1.0,))(values, at(values)).mean()) - 0.5) < 0.01


def test_slerp_by_hand():
    assert arc(0.0, 0.5) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    first, second = arc(0.5, 0.25)  # 60 degrees: sin 45 / sin 60, sin 15 / sin 60
    assert (first, second) == pytest.approx((0.816496580927726, 0.298858490722685))
    assert arc(1.0, 0.3) is None and arc(float("nan"), 0.3) is None and arc(0.99951, 0.3) is None
    assert cosine(3.0, 9.0, 4.0) == 0.5 and cosine(0.0, 0.0, 4.0) == 1.0


def test_model_stock_by_hand():
    assert share([0.5], 2) == pytest.approx(2 / 3)  # 2 * 0.5 / (1 + 0.5)
    assert share([1.0, 1.0, 1.0], 3) == 1.0 and share([0.0], 2) == 0.0 and share([-0.4], 2) == 0.0


def test_breadcrumbs_by_hand():
    values = tensors([1.0, 1, 1, 1], [1.1, 3, 9, 0.5])
    assert AddBand(((0.3, 5.0),), (0.5,))(values, at(values)).tolist() == pytest.approx([1.0, 2.0, 1.0, 0.75])


def test_on_models(tmp_path):
    """The same numbers through files: slerp and Model Stock against the formula on whole tensors, Breadcrumbs by sorting."""
    base, a, b = family(tmp_path)
    one, two, zero = (all_weights(f) for f in (a, b, base))
    slerp(a, b, tmp_path / "slerp", t=0.3)
    merge("model_stock", [a, b], tmp_path / "stock", base=base)
    merge("breadcrumbs", [a, b], tmp_path / "crumbs", base=base, density=0.5, outliers=0.1, scale=0.7)
    got = {n: all_weights(tmp_path / n) for n in ("slerp", "stock", "crumbs")}
    for name, x in one.items():
        x, y, z = (t[name].double() for t in (one, two, zero))
        omega = torch.acos((x * y).sum() / x.norm() / y.norm())
        if float(torch.cos(omega)) <= 0.9995:
            wanted = (torch.sin(0.7 * omega) * x + torch.sin(0.3 * omega) * y) / torch.sin(omega)
            assert torch.allclose(got["slerp"][name].double(), wanted, atol=1e-6), name
        else:
            assert torch.allclose(got["slerp"][name].double(), 0.7 * x + 0.3 * y, atol=1e-6), name
        cos = float(((x - z) * (y - z)).sum() / (x - z).norm() / (y - z).norm())
        t = max(2 * cos / (1 + cos), 0.0)
        assert torch.allclose(got["stock"][name].double(), t * (x + y) / 2 + (1 - t) * z, atol=1e-6), name
        wanted = z.clone()
        for other in (one[name], two[name]):
            change = (other - zero[name]).double()
            size, n = change.abs().flatten().sort(descending=True).values, change.numel()
            top, last = round(0.1 * n), round(0.6 * n)
            high = size[top - 1] if top else float("inf")
            wanted += 0.7 * torch.where((change.abs() >= size[last - 1]) & (change.abs() < high), change, 0.0)
        assert torch.allclose(got["crumbs"][name].double(), wanted, atol=1e-6), name


# KIF and RECALL have tests of their own; `interpolate` is `linear` with other words.
@pytest.mark.parametrize("name", [name for name in MERGES if name not in ("recall", "kif", "interpolate", "fapm")])
def test_whatever_it_is_cut_into_it_gives_the_same_bytes(tmp_path, monkeypatch, name):
    base, a, b = family(tmp_path)
    based = {"base": base} if merge_class(name).from_base else {}
    merge(name, [a, b], tmp_path / "whole", **based)
    monkeypatch.setattr(chunks, "CHUNK", chunks._STEP)
    monkeypatch.setattr(chunks, "BLOCK", 2 * chunks._STEP)
    merge(name, [a, b], tmp_path / "pieces", max_shard_size="20KB", **based)
    whole, pieces = all_weights(tmp_path / "whole"), all_weights(tmp_path / "pieces")
    exact = name not in ("slerp", "model_stock")  # sums of products, in another order
    assert all(torch.equal(whole[n], pieces[n]) if exact else torch.allclose(whole[n], pieces[n]) for n in whole)


@pytest.mark.parametrize("name", [n for n in MERGES if n not in ("interpolate", "kif")])
def test_adapters_full_models_and_the_same_call_again(tmp_path, name):
    base = build()
    save(base, tmp_path / "base")
    models = [adapter(base, tmp_path / "a", 1), adapter(base, tmp_path / "b", 2)]
    call = {"base": tmp_path / "base", **({"calibration": ["w1 w2 w3", "w4 w5"]} if name == "recall" else {})}
    result = merge(name, models, tmp_path / "out", **call)
    assert result.kind == ("adapter" if merge_class(name).linear else "model")
    before = digest(tmp_path / "out")
    again = merge(name, models, tmp_path / "out", **call)
    assert digest(tmp_path / "out") == before and again.report["plan"] == result.report["plan"]
    with pytest.raises(FileExistsError):
        merge("linear", models[:1], tmp_path / "out", base=tmp_path / "base")
    dry = merge(name, models, tmp_path / "dry", **call, dry_run=True)
    assert dry.kind == result.kind and not (tmp_path / "dry").exists()


def test_what_passes_found_is_not_looked_for_again(tmp_path, monkeypatch):
    from hf_continual.merging import pipeline
    from hf_continual.merging.engine.passes import Passes

    base, a, b = family(tmp_path)
    ties([a, b], tmp_path / "straight", base=base)
    looked = []
    over = Passes.over
    monkeypatch.setattr(Passes, "over", lambda *args: (looked.append(1), over(*args))[1])
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_shards", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ties([a, b], tmp_path / "out", base=base)
    assert len(looked) == 4
    ties([a, b], tmp_path / "out", base=base)
    assert len(looked) == 4 and digest(tmp_path / "out") == digest(tmp_path / "straight")
    ties([a, b], tmp_path / "other", base=base, density=0.3)
    assert len(looked) == 8


@dataclass
class Median(MergeMethod):
    """A custom rule."""

    shift: float = 0.0

    name: ClassVar[str] = "median"
    paper: ClassVar[Paper] = Paper("Median", "Nobody", 2026)
    models: ClassVar[tuple[int, int | None]] = (3, None)

    def check(self, models: Models) -> None:
        if len(models.members) % 2 == 0:
            raise ValueError(f"{len(models.members)} models have no middle one; give an odd number.")

    def prepare(self, models, passes):
        def rule(values: Sequence[torch.Tensor], at: Chunk) -> torch.Tensor:
            return torch.stack(list(values)).median(0).values + self.shift * (at.name == "model.norm.weight")

        return lambda name: rule


def test_a_dry_run_tells_nothing_of_an_earlier_merge(tmp_path):
    base, a, b = family(tmp_path)
    method = merge_class("slerp")(t=0.5)
    assert merge(method, [a, b], tmp_path / "1").report["cosines"]
    assert "cosines" not in merge(method, [base, a], tmp_path / "2", dry_run=True).report
    fresh = merge("slerp", [base, a], tmp_path / "3", t=0.5).report["cosines"]
    assert merge(method, [base, a], tmp_path / "2").report["cosines"] == fresh


def test_a_rule_of_ones_own(tmp_path):
    base, a, b = family(tmp_path)
    name = "tests.merging.test_rules:Median"
    result = merge(name, [base, a, b], tmp_path / "out", shift=2.0)
    assert result.report["method"] == "median" and result.report["options"] == {"shift": 2.0}
    three = [all_weights(f) for f in (base, a, b)]
    for n, got in all_weights(tmp_path / "out").items():
        wanted = torch.stack([t[n].float() for t in three]).median(0).values + 2.0 * (n == "model.norm.weight")
        assert torch.allclose(got.float(), wanted), n
    merge(Median(), [base, a, b], tmp_path / "object")
    with pytest.raises(ValueError, match="takes 3 or more models, but 2 were given"):
        merge(name, [a, b], tmp_path / "x")
    with pytest.raises(ValueError, match="4 models have no middle one"):
        merge(name, [a, b, base, a], tmp_path / "x")


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("tees", {}, "there is no merge 'tees'. Did you mean 'ties'"),
        (
            "ties",
            {"densty": 0.2},
            r"merge ties has no option 'densty'. Did you mean 'density'\? It takes density, scale\.$",
        ),
        ("model_stock", {"_shares": {}}, "merge model_stock has no option '_shares'. It takes no options of its own"),
        ("ties", {"density": 0}, r"ties\(density=0\) must lie between 0 and 1, 0 excluded"),
        ("dare", {"density": 1.5}, r"dare\(density=1.5\) must lie between 0 and 1"),
        ("slerp", {"t": 2}, r"slerp\(t=2\) must lie between 0 and 1. It is a fraction of the way"),
        ("breadcrumbs", {"density": 0.9, "outliers": 0.2}, "density=0.9 and outliers=0.2"),
        ("dare", {"scale": [1.0]}, r"scale=\[1.0\] has 1 numbers for 2 models"),
        ("ties", {"density": "0.2"}, r"ties\(density='0.2'\) must be a number, got str"),
        ("ties", {"scale": "x"}, "scale='x': give a number, or a list"),
        ("slerp", {"t": "half"}, r"slerp\(t='half'\) must be a number, got str"),
        ("interpolate", {"alpha": True}, r"interpolate\(alpha=True\) must be a number, got bool"),
        ("breadcrumbs", {"outliers": "few"}, r"breadcrumbs\(outliers='few'\) must be a number"),
        ("dare", {"seed": 1.5}, r"dare\(seed=1.5\) must be a whole number, got float"),
        ("dare_ties", {"seed": -1}, r"dare_ties\(seed=-1\) must be at least 0"),
        ("linear", {"weights": ["a", "b"]}, r"weights=\['a', 'b'\]: give numbers"),
        ("recall", {"temperature": "low"}, r"recall\(temperature='low'\) must be a number"),
        ("recall", {"num_typical": 2.5}, r"recall\(num_typical=2.5\) must be a whole number"),
        ("builtins:dict", {}, "not a subclass of"),
        ("nowhere:Rule", {}, "cannot be imported"),
    ],
)
def test_sentences(tmp_path, method, options, said):
    base, a, b = family(tmp_path)
    with pytest.raises((ValueError, TypeError), match=said):
        merge(method, [a, b], tmp_path / "out", base=base, **options)
    with pytest.raises(ValueError, match="merge dare needs base="):
        merge("dare", [a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_thin_functions_are_the_pipeline(tmp_path):
    base, a, b = family(tmp_path)
    dare([a, b], tmp_path / "1", base=base, density=0.3, seed=4)
    merge("dare", [a, b], tmp_path / "2", base=base, density=0.3, seed=4)
    dare_ties([a, b], tmp_path / "3", base=base, density=0.3)
    merge("dare_ties", [a, b], tmp_path / "4", base=base, density=0.3)
    assert digest(tmp_path / "1") == digest(tmp_path / "2") != digest(tmp_path / "3") == digest(tmp_path / "4")
    dare([a, b], tmp_path / "5", base=base, density=0.3, seed=5)
    assert digest(tmp_path / "5") != digest(tmp_path / "1")
    report = json.loads((tmp_path / "1" / "merge_report.json").read_text())
    assert report["options"] == {"density": 0.3, "scale": [0.5, 0.5], "seed": 4}


def test_between_the_tasks_of_a_plan_by_name(tmp_path):
    from hf_continual import train_stream
    from tests.stream.world import make

    for i, name in enumerate(("dare_ties", "tests.merging.test_rules:Median")):
        options = {"density": 0.5} if not i else {"shift": 1.0}
        merged = {"merge": {"function": name, "options": options, "start": "merged" if not i else "base"}}
        plan = make(tmp_path, between_tasks=merged, output_dir=str(tmp_path / str(i)))
        plan["evaluation"] = {"base": False, "bootstrap": 0}
        plan["tasks"] = [{k: v for k, v in task.items() if k != "test"} for task in plan["tasks"]]
        if i:  # two models have no middle one, so this is set on the plan
            with pytest.raises(ValueError, match="takes 3 or more models, but 2 were given"):
                train_stream(plan)
            continue
        train_stream(plan)
        report = json.loads((tmp_path / str(i) / "task-02-t2" / "merge_report.json").read_text())
        assert report["method"] == name and report["options"]["density"] == 0.5


class TestTheSameCallAgain:
    """When finished, it returns the existing result; for other options, it refuses; no pass is made twice."""

    def test_recall(self, tmp_path, monkeypatch):
        from hf_continual.merging.methods.recall import method as recall_method

        _, a, b = family(tmp_path)
        toy_rows = [f"w{i} w{i + 1} w{i + 2} w3" for i in range(12)]
        call = dict(calibration=toy_rows, num_typical=3, progress=False)
        first = merge_with_recall([a, b], tmp_path / "out", **call)
        before = digest(tmp_path / "out")

        def refused(*args):
            raise AssertionError("calibrated again")

        monkeypatch.setattr(recall_method, "calibrated", refused)
        again = merge_with_recall([a, b], tmp_path / "out", **call)
        assert digest(tmp_path / "out") == before and again.report == first.report
        assert np.array_equal(again.weights, first.weights) and again.model_names == first.model_names
        named = merge("recall", [a, b], tmp_path / "out", **call)
        assert named.report == first.report and np.array_equal(named.weights, first.weights)
        for other in ({"calibration": toy_rows[1:]}, {"num_typical": 2}, {"temperature": 2.0}):
            with pytest.raises(FileExistsError):
                merge_with_recall([a, b], tmp_path / "out", **{**call, **other})

    def test_scan_alpha(self, tmp_path):
        base, a, _ = family(tmp_path)
        measured = []
        call = dict(gauge=lambda folder: (measured.append(1), -float(len(measured)))[1], alphas=(0.0, 0.5, 1.0))
        first, scores = scan_alpha(base, a, tmp_path / "out", **call)
        before = digest(tmp_path / "out")
        again, same = scan_alpha(base, a, tmp_path / "out", **call)
        assert len(measured) == 3 and same == scores and digest(tmp_path / "out") == before
        assert again.report["options"] == first.report["options"] == {"alpha": 0.0}
        with pytest.raises(FileExistsError):
            scan_alpha(base, a, tmp_path / "out", **{**call, "alphas": (0.0, 0.25)})

    def test_kif_fuse(self, tmp_path):
        from tests.merging.test_kif_fuse import write_scores
        from tests.merging.world import tensors as all_tensors

        base, a, b = family(tmp_path)
        like = all_tensors(base)
        files = [tmp_path / "new.safetensors", tmp_path / "old.safetensors"]
        for i, file in enumerate(files):
            write_scores(file, like, i)
        call = dict(old=b, importance=tuple(files))
        first = kif_fuse(base, a, tmp_path / "out", **call)
        before = digest(tmp_path / "out")
        again = kif_fuse(base, a, tmp_path / "out", **call)
        assert digest(tmp_path / "out") == before and again.report == first.report
        named = merge("kif", [b, a], tmp_path / "out", base=base, importance=tuple(files))
        assert named.report == first.report and named.bytes_read == first.bytes_read
        with pytest.raises(ValueError, match="merge kif takes 1 to 2 models, but 3 were given"):
            merge("kif", [b, a, b], tmp_path / "no", base=base, importance=tuple(files))
        with pytest.raises(FileExistsError):
            kif_fuse(base, a, tmp_path / "out", top_share=0.3, **call)
        write_scores(files[0], like, 5)  # other scores under the same header
        with pytest.raises(FileExistsError):
            kif_fuse(base, a, tmp_path / "out", **call)
