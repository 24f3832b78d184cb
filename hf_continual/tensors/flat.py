"""All trainable parameters end to end in one buffer: one kernel per bucket instead of one per parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_continual.tensors.residuals import KeepsResiduals

# Elements gathered at a time: bounds the copies, which on a CPU stay in the cache.
CPU_BUCKET, DEVICE_BUCKET = 1 << 18, 1 << 22


@dataclass(frozen=True)
class Bucket:
    """A run of whole parameters: elements `start` to `stop` of every buffer."""

    start: int
    stop: int
    names: tuple[str, ...]

    def of(self, buffer: Tensor) -> Tensor:
        """This bucket's part of a buffer, as a view."""
        return buffer[self.start : self.stop]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor on this process; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Flat:
    """Layout of parameters (under FSDP, of their shards on this process) in flat float32 buffers.

    Args:
        params: Parameters by name, all on one device.
        optimizer: The optimizer of the weights. If it keeps the residuals of weights in low precision, weights are read
            and written exactly.

    Raises:
        ValueError: If they are on several devices of this process.
    """

    def __init__(self, params: Mapping[str, Tensor], optimizer: object = None) -> None:
        self.params = dict(params)
        self.residuals = optimizer if isinstance(optimizer, KeepsResiduals) else None
        devices = sorted({str(p.device) for p in self.params.values()})
        if len(devices) > 1:
            raise ValueError(
                f"the trainable weights are on {', '.join(devices)}, and one buffer must hold them all. Load the model on one "
                f"device, or shard it with FSDP2, one process per device."
            )
        self.device = local(next(iter(self.params.values())).detach()).device
        most = CPU_BUCKET if self.device.type == "cpu" else DEVICE_BUCKET
        self.spans: dict[str, tuple[int, int]] = {}
        self.buckets: list[Bucket] = []
        start, size, names = 0, 0, []
        for name, p in self.params.items():
            count = local(p.detach()).numel()
            if names and size + count - start > most:
                self.buckets.append(Bucket(start, size, tuple(names)))
                start, names = size, []
            self.spans[name] = (size, size + count)
            size += count
            names.append(name)
        self.buckets.append(Bucket(start, size, tuple(names)))
        self.size = size
        self._room = torch.empty(2, max(b.stop - b.start for b in self.buckets), device=self.device)

    def zeros(self) -> Tensor:
        """A buffer of zeros."""
        return torch.zeros(self.size, device=self.device)

    def _views(self, bucket: Bucket, buffer: Tensor) -> list[Tensor]:
        shapes = [local(self.params[n].detach()).shape for n in bucket.names]
        spans = [self.spans[n] for n in bucket.names]
        return [buffer[a - bucket.start : b - bucket.start].view(s) for (a, b), s in zip(spans, shapes, strict=True)]

    @torch.no_grad()
    def weights(self, bucket: Bucket) -> Tensor:
        """The bucket's exact weights, float32, in memory that the next call reuses."""
        room = self._room[0, : bucket.stop - bucket.start]
        views = self._views(bucket, room)
        torch._foreach_copy_(views, [local(self.params[n].detach()) for n in bucket.names])
        if self.residuals is not None:
            rounded = [(v, self.residuals.residual(self.params[n])) for v, n in zip(views, bucket.names, strict=True)]
            if pairs := [(view, residual) for view, residual in rounded if residual is not None]:
                torch._foreach_add_([view for view, _ in pairs], [residual for _, residual in pairs])
        return room

    @torch.no_grad()
    def gradients(self, bucket: Bucket) -> Tensor:
        """The bucket's gradients, zero where a parameter has none, in separate memory that the next call reuses."""
        room = self._room[1, : bucket.stop - bucket.start]
        views = self._views(bucket, room)
        held = [self.params[n].grad for n in bucket.names]
        if any(g is None for g in held):
            room.zero_()
        pairs = [(v, local(g)) for v, g in zip(views, held, strict=True) if g is not None]
        if pairs:
            torch._foreach_copy_([v for v, _ in pairs], [g for _, g in pairs])
        return room

    @torch.no_grad()
    def write(self, bucket: Bucket, values: Tensor) -> None:
        """Write values into the bucket's weights, rounded to their dtype, and rounding errors into the residuals."""
        weights, views = [local(self.params[n].detach()) for n in bucket.names], self._views(bucket, values)
        residuals = [None if self.residuals is None else self.residuals.residual(self.params[n]) for n in bucket.names]
        torch._foreach_copy_(weights, views)
        for name, weight, view, residual in zip(bucket.names, weights, views, residuals, strict=True):
            if residual is not None:
                torch.sub(view, weight, out=residual)
            if self.residuals is not None:
                self.residuals.settle(self.params[name])

    def all_gradients(self) -> list[Tensor]:
        """The gradients that exist, this process's shards."""
        return [local(p.grad) for p in self.params.values() if p.grad is not None]

    def copy_weights(self, buffer: Tensor) -> None:
        """Copy all weights into a buffer."""
        for bucket in self.buckets:
            bucket.of(buffer).copy_(self.weights(bucket))

    def items(self, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Views of a buffer by parameter name, shaped like the parameters' shards on this process."""
        for name, (start, stop) in self.spans.items():
            yield name, buffer[start:stop].view(local(self.params[name].detach()).shape)

    def named(self, buffer: Tensor, prefix: str, keep: bool = True) -> dict[str, Tensor]:
        """A buffer as whole tensors by parameter name, on the CPU. All processes must call this together.

        Args:
            buffer: Made by `zeros`.
            prefix: Put before each name.
            keep: Whether this process needs them; if they are sharded, all processes take part in gathering.

        Returns:
            Tensors of the parameters' full shapes, nothing where `keep` is False.
        """
        found = {}
        for name, view in self.items(buffer):
            p = self.params[name]
            whole = view
            if isinstance(p, DTensor):
                whole = DTensor.from_local(
                    view, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                ).full_tensor()
            if keep:
                found[prefix + name] = whole.detach().cpu().clone()
        return found

    def fill(self, buffer: Tensor, named: Mapping[str, Tensor], prefix: str) -> None:
        """Load a buffer from what `named` returned.

        Args:
            buffer: Is overwritten.
            named: Whole tensors by name.
            prefix: Prefix of each name.

        Raises:
            ValueError: If a parameter is missing or has another shape; names the first five.
        """
        wrong = [
            f"{n} ({'missing' if prefix + n not in named else f'{tuple(named[prefix + n].shape)} there'}, "
            f"{tuple(p.shape)} here)"
            for n, p in self.params.items()
            if prefix + n not in named or named[prefix + n].shape != p.shape
        ]
        if wrong:
            raise ValueError(
                f"the state does not belong to these parameters: {len(wrong)} differ, first {'; '.join(wrong[:5])}. "
                f"Resume with the model and adapter that it was saved with."
            )
        for name, view in self.items(buffer):
            p, whole = self.params[name], named[prefix + name].to(self.device, torch.float32)
            if isinstance(p, DTensor):
                whole = distribute_tensor(whole, p.device_mesh, p.placements).to_local()
            view.copy_(whole)


def bytes_of(buffers: Sequence[Tensor]) -> int:
    """Bytes that buffers take."""
    return sum(b.numel() * b.element_size() for b in buffers)
