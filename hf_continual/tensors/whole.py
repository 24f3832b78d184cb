"""Convert between a tensor that is sharded over processes and the whole tensor."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor on this process; if it is sharded, every process must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_as(tensor: Tensor, p: Tensor) -> Tensor:
    """A whole tensor, sharded like a parameter; the tensor itself if that is not sharded."""
    return distribute_tensor(tensor, p.device_mesh, p.placements) if isinstance(p, DTensor) else tensor


def shape_of(p: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter; ZeRO-3 leaves an empty tensor in its place."""
    return tuple(getattr(p, "ds_shape", p.shape))


def elements(p: Tensor) -> int:
    """Number of elements of the whole parameter."""
    return int(getattr(p, "ds_numel", p.numel()))
