"""Selection by counting: exact, and in a bounded amount of memory whatever the number of values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_continual.methods.kif.two_sides import Fusion, TwoSides
from hf_continual.tensors import importance, selection
from hf_continual.tensors.flat import Flat
from hf_continual.tensors.importance import share_rank, share_threshold, top_share_masks

MIB = 1 << 20


def peak_bytes(call) -> int:
    """Peak memory of the tensors that a call adds, by torch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0
    return peak


def test_the_instrument_sees_what_is_made():
    x = torch.ones(MIB)
    assert 8 * MIB <= peak_bytes(lambda: (x + 1) * 2) <= 9 * MIB


@pytest.mark.parametrize("add_up", [None, lambda counts: counts], ids=["alone", "sharded"])
def test_a_threshold_takes_a_bounded_amount_of_memory(add_up):
    """All at once it was 28 bytes per value, 224 MiB here."""
    x = torch.rand(8 * MIB, generator=torch.Generator().manual_seed(0))
    found = []
    peak = peak_bytes(lambda: found.append(share_threshold(x, 0.2, x.numel(), add_up)))
    assert peak < 16 * MIB
    assert found[0] == x.sort().values[share_rank(x.numel(), 0.2)]


FUSION = {"rule": "paper", "top_share": 0.2, "beta1": 0.85, "beta2": 0.85, "order": "first", "temperature": 1.0}


def sides(scope="global", uncertainty=False, number=40, size=100_000, add_up=None):
    g = torch.Generator().manual_seed(1)
    params = {f"p{i}": torch.nn.Parameter(torch.randn(size, generator=g)) for i in range(number)}
    made = TwoSides(Flat(params), Fusion(scope=scope, uncertainty=uncertainty, **FUSION), add_up)
    for side in (made.inner, made.outer):
        for p in params.values():
            p.grad = torch.randn(size, generator=g)
        made.record(side)
    return made


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_fusion_takes_two_bytes_a_weight_on_top_of_its_buffers(scope, uncertainty, sharded):
    """The two masks, and memory that does not grow with the model."""
    made = sides(scope, uncertainty, add_up=(lambda counts: counts) if sharded else None)
    size = made.flat.size

    def round_():
        made.end_inner()
        made.fuse()

    buffers_before = sum(b.numel() * 4 for b in made.buffers().values())
    assert peak_bytes(round_) < 2 * size + 24 * MIB < buffers_before


@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_masks_by_bucket_are_those_of_all_scores_together(scope, uncertainty, monkeypatch):
    monkeypatch.setattr(selection, "CPU_PIECE", 777)
    monkeypatch.setattr(importance, "SELECTED_DIRECTLY", 100)
    made = sides(scope, uncertainty, number=7, size=90_001)
    assert len(made.flat.buckets) > 2
    scored = [importance.scores(side[0], side[1] if uncertainty else None).clone() for side in (made.inner, made.outer)]
    made.end_inner()
    for values, mask in zip(scored, (made.mask_in, made._mask_out()), strict=True):
        named = {n: v.clone() for n, v in made.flat.items(values)}
        wanted = top_share_masks(named, 0.2, scope)
        assert all(torch.equal(m, wanted[n]) for n, m in made.flat.items(mask))


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1e-30, 1.0, -2.0, 3.5, float("inf")]), min_size=1, max_size=60),
    piece=st.integers(1, 9),
    share=st.floats(0.01, 1),
)
def test_pieces_change_nothing(values, piece, share):
    x = torch.tensor(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CPU_PIECE", piece)
        patch.setattr(importance, "SELECTED_DIRECTLY", 0)
        assert share_threshold(x, share) == x.sort().values[share_rank(len(x), share)]


def test_the_value_of_a_rank_is_the_same_by_sorting():
    values = torch.randn(3, 17, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with equal values
    for rank in range(17):
        sorted_ = selection.value_of_rank(values, rank, by_sorting=True)
        assert sorted_.shape == (3, 1) and torch.equal(sorted_, selection.value_of_rank(values, rank))
