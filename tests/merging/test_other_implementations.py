"""Numbers that mergekit 0.1.5 gave for these tensors: the same here, or different for a stated reason."""

from __future__ import annotations

import pytest
import torch

from hf_continual.merging.engine.average import Average
from hf_continual.merging.engine.chunks import Chunk
from hf_continual.merging.engine.task_vectors import cosine, elect_and_merge
from hf_continual.merging.engine.threshold import kth_largest
from hf_continual.merging.methods.breadcrumbs import AddBand
from hf_continual.merging.methods.della import pruned
from hf_continual.merging.methods.model_stock import pairs, share
from hf_continual.merging.methods.slerp import Arc, arc
from hf_continual.merging.methods.ties import TrimElectMerge

BASE = torch.tensor([1.0, -2, 0.5, 3, -1, 0.25, 2, -0.5])
A = BASE + torch.tensor([0.5, -0.1, 0.3, -0.8, 0.05, 0.6, -0.2, 0.4])
B = BASE + torch.tensor([-0.4, -0.7, 0.2, 0.9, 0.1, 0.3, -0.6, -0.35])
C = BASE + torch.tensor([0.5, -0.6, 0.3, 0.1, 0.05, 0.6, -0.2, 0.1])


def largest(model, kth):
    return kth_largest(lambda: [(model - BASE).abs()], kth)


def same(found, wanted):
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-6)


def test_ties_with_one_threshold_per_tensor():
    """mergekit trims each tensor separately, the paper and this library the whole task vector: here there is one tensor."""
    rule = TrimElectMerge((largest(A, 4), largest(B, 4)), scale=0.8)
    same(rule([BASE.clone(), A.clone(), B.clone()]), [1.4, -2.56, 0.5, 3.72, -1, 0.73, 1.52, -0.18])


def test_a_tie_of_the_signs():
    """The paper's sign of a sum of zero is zero, and nothing is kept; mergekit elects a plus sign and gives 0.5 and 0.5."""
    changes = [torch.tensor([0.5, 0.5]), torch.tensor([-0.5, -0.25])]
    same(elect_and_merge(torch.zeros(2), changes, 1.0), [0.0, 0.5])


def test_breadcrumbs():
    bands = tuple((largest(m, 5), largest(m, 1)) for m in (A, B))  # of 8, 1 is an outlier and the next 4 are kept
    found = AddBand(bands, (0.3, 0.3))([BASE.clone(), A.clone(), B.clone()])
    same(found, [1.03, -2.21, 0.59, 3.0, -1.0, 0.43, 1.82, -0.485])


def test_slerp():
    factors = arc(cosine(float(A @ B), float(A @ A), float(B @ B)), 0.3)
    found = Arc(*factors)([A.clone(), B.clone()])
    same(found, [1.250754, -2.3241658, 0.78415585, 2.7649734, -0.9523686, 0.7734666, 1.710429, -0.332964])


@pytest.mark.parametrize(
    ("models", "t", "wanted"),
    [
        ((A, C), 0.73225546, [1.3661277, -2.2562895, 0.7196767, 2.7437105, -0.9633872, 0.6893533, 1.8535489, -0.3169361]),
        ((A, B, C), 0.4528097, [1.0905619, -2.2113113, 0.6207492, 3.0301876, -0.9698126, 0.4764048, 1.8490634, -0.4773595]),
        # Changes that point away from each other (cosine -0.35). mergekit's t is -1.07: past the base, away from every model.
        # Here the fraction of the average is never below 0.
        ((A, B), 0.0, BASE.tolist()),
    ],
)  # fmt: skip
def test_model_stock(models, t, wanted):
    d = [(m - BASE).double() for m in models]
    cosines = [cosine(float(d[i] @ d[j]), float(d[i] @ d[i]), float(d[j] @ d[j])) for i, j in pairs(len(d))]
    found = share(cosines, len(d))
    assert found == pytest.approx(t, abs=1e-6)
    rule = Average((1 - found, *((found / len(d),) * len(d))))
    same(rule([BASE.clone(), *[m.clone() for m in models]]), wanted)


def test_della_keeps_expectations():
    """mergekit keeps the same number from each quarter of the ranks, and then scales all of them equally, to the tensor's L1 norm.

    Of the quarters of its ranks, smallest first, 0.754, 0.860, 0.965 and 1.071 of the change remain on average. The paper divides
    each by its own probability, so that 1 remains.
    """
    torch.manual_seed(0)
    change = torch.randn(64, 4096)
    quarter = change.abs().argsort(1).argsort(1) // 1024
    at = Chunk("w", (64, 4096), 0, change.numel(), 0, [])
    runs = torch.stack([pruned(change.flatten().clone(), 0.3, 0.14, s, 0, at).view(64, 4096) for s in range(20)])
    kept, came = (runs != 0).double().mean(0), runs.mean(0) / change
    for q, wanted in enumerate((0.2477, 0.2832, 0.3172, 0.3521)):
        assert float(kept[quarter == q].mean()) == pytest.approx(wanted, abs=2e-3)
        assert float(came[quarter == q].mean()) == pytest.approx(1.0, abs=0.02)
