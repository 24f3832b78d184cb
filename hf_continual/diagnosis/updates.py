"""Two weight updates compared layer by layer, one matrix in memory at a time.

The update of the old task is BEFORE - base, that of the new one AFTER - BEFORE. Zheng et al. (ICLR 2025, section 4.2) look at
the angle between their column spaces: near 90 degrees in the upper layers where the new task is learned next to the old one,
smaller in the bottom layers where it undoes what the old one aligned. A weight is taken as it is stored; GPT-2
stores its own transposed, so that there it is the row space. The principal angles of two subspaces with orthonormal
bases U, V are the arc cosines of the singular values of U^T V (Björck & Golub 1973).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_continual.merging.inputs.members import Member
from hf_continual.merging.inputs.safetensors_file import Files
from hf_continual.merging.inputs.structure import groups_of, ordered
from hf_continual.progress import over

RANK = 8


def effective(member: Member, name: str) -> Tensor | None:
    """A weight as the model computes with it, in fp32: the stored values and the adapter's product.

    Args:
        member: Full model, or base with adapter.
        name: Name in the full model.

    Returns:
        The values; None if the model has no such tensor.
    """
    view = member.view(name)
    if view is None or not view.source.is_float:
        return None
    with Files() as files:
        found = files.load(view.source).float()
        if view.added is not None:
            found = found + view.added[1] * files.load(view.added[0]).float()
    if view.factors is None:
        return found
    left, right = view.factors.load()
    found = found + left @ right
    if view.factors.magnitude is None:
        return found
    with Files() as files:
        size = files.load(view.factors.magnitude).float().flatten()
    # DoRA: each output's weights have the norm that was learned.
    rows = found.T if view.factors.transposed else found
    scaled = rows * (size / rows.norm(dim=1)).unsqueeze(1)
    return scaled.T.contiguous() if view.factors.transposed else scaled


def principal_angles(one_OI: Tensor, two_OI: Tensor, rank: int = RANK, seed: int = 0) -> Tensor:
    """Angles between the leading column spaces of two matrices.

    Args:
        one_OI: A matrix, ``(out, in)``.
        two_OI: Another with as many rows.
        rank: Dimension of the subspaces, at most; no more than the smaller side.
        seed: Seed of the randomised SVD (Halko et al. 2011), which is used where it is cheaper.

    Returns:
        Angles in degrees, smallest first; as many as the rank, fewer where an update has fewer directions, empty where one is 0.
    """
    spaces = [_column_space(m.double(), rank, seed) for m in (one_OI, two_OI)]
    number = min(space.shape[1] for space in spaces)
    if number == 0:
        return torch.zeros(0, dtype=torch.float64)
    # The leading directions of both, as many of each.
    cosines = torch.linalg.svdvals(spaces[0][:, :number].T @ spaces[1][:, :number])
    return torch.rad2deg(torch.arccos(cosines.clamp(0, 1)))


def _column_space(matrix: Tensor, rank: int, seed: int) -> Tensor:
    if not bool(matrix.any()):
        return matrix[:, :0]
    smallest = min(matrix.shape)
    if smallest <= 4 * rank:
        left, sizes, _ = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            left, sizes, _ = torch.svd_lowrank(matrix, q=2 * rank, niter=4)
    number = int((sizes > 1e-6 * sizes[0]).sum())  # fp32 differences hold noise below that
    return left[:, : min(rank, number)]


def update_layers(before: Member, after: Member, base: Member | None, rank: int = RANK) -> list[dict[str, Any]]:
    """Size of the new update in every layer, and its angle to the old task's.

    Reads each checkpoint once; memory is that of four fp32 copies of the largest matrix.

    Args:
        before: Before the new training.
        after: After it.
        base: Before the old one; None: there are no angles.
        rank: Dimension of the subspaces.

    Returns:
        Per layer (``"embed"``, ``"layer.0"``, ..., ``"final"``): ``size`` of AFTER - BEFORE relative to BEFORE in Frobenius norm, ``old_size``
        of BEFORE - base, ``angle`` in degrees (mean over the principal angles of its matrices), ``chance`` (the root mean square
        cosine of two random subspaces, as an angle) and ``matrices`` that the angle is a mean over.
    """
    sums: dict[str, dict[str, Any]] = {}
    groups = groups_of(before.names, before.checkpoint.config)
    for name in over(before.names, "comparing weights", " tensors"):
        weight = effective(before, name)
        new = effective(after, name)
        if weight is None or new is None or weight.shape != new.shape:
            continue  # a vocabulary that grew
        layer = groups[name]
        entry = sums.setdefault(layer, {"weight": 0.0, "new": 0.0, "old": 0.0, "angles": [], "chance": []})
        change = new - weight
        entry["weight"] += float(weight.double().square().sum())
        entry["new"] += float(change.double().square().sum())
        first = None if base is None else effective(base, name)
        if first is None or first.shape != weight.shape:
            continue
        old = weight - first
        entry["old"] += float(old.double().square().sum())
        if weight.ndim == 2 and layer.startswith("layer."):
            _add_angles(entry, old, change, rank)
    return [{"layer": layer, **_summed(sums[layer], base is not None)} for layer in ordered(sums)]


def _add_angles(entry: dict[str, Any], old: Tensor, change: Tensor, rank: int) -> None:
    angles = principal_angles(old, change, rank)
    if len(angles):
        entry["angles"].append(float(angles.mean()))
        entry["chance"].append(math.degrees(math.acos(math.sqrt(min(len(angles) / old.shape[0], 1.0)))))


def _summed(entry: Mapping[str, Any], old: bool) -> dict[str, Any]:
    norm = math.sqrt(entry["weight"]) or 1.0
    angles, chance = entry["angles"], entry["chance"]
    return {
        "size": math.sqrt(entry["new"]) / norm,
        "old_size": math.sqrt(entry["old"]) / norm if old else None,
        "angle": sum(angles) / len(angles) if angles else None,
        "chance": sum(chance) / len(chance) if chance else None,
        "matrices": len(angles),
    }
