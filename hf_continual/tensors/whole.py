"""Convert between a tensor that is sharded over processes and the whole tensor."""

from __future__ import annotations

from torch import Tensor, nn
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


def trainable_share(model: nn.Module) -> float:
    """Trainable parameters over all parameters of a model, 0 to 1, also where they are sharded; quantised ones as stored."""
    sizes = [(elements(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained) / max(sum(n for n, _ in sizes), 1)
