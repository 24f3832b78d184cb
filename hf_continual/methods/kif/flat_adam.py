"""Adam over all trainable weights with float32 moments, for weights of any dtype."""

from __future__ import annotations

import torch

from hf_continual.tensors.flat import Flat


class FlatAdam:
    """A second learner for weights that already have an optimizer: two float32 buffers, torch's fused kernel.

    Args:
        flat: Layout of the weights.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
    """

    def __init__(self, flat: Flat, betas: tuple[float, float], eps: float) -> None:
        self.flat, self.betas, self.eps, self.t = flat, betas, eps, 0
        self.moments = [flat.zeros(), flat.zeros()]

    def kept(self) -> list[torch.Tensor]:
        """All tensors that it keeps."""
        return self.moments

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the weights along their gradients.

        Args:
            lr: Learning rate of this step.
        """
        self.t += 1
        # The kernel keeps count in float32 on the device; a fresh tensor avoids keeping one per bucket.
        count = torch.full((), float(self.t), device=self.flat.device)
        for bucket in self.flat.buckets:
            if bucket.stop == bucket.start:
                continue
            weights, (m, v) = self.flat.weights(bucket), (bucket.of(b) for b in self.moments)
            torch._fused_adamw_(
                [weights], [self.flat.gradients(bucket)], [m], [v], [], [count],
                lr=lr, beta1=self.betas[0], beta2=self.betas[1], weight_decay=0.0, eps=self.eps,
                amsgrad=False, maximize=False,
            )  # fmt: skip
            self.flat.write(bucket, weights)

    def __repr__(self) -> str:
        return f"FlatAdam({self.flat.size} weights, betas={self.betas}, eps={self.eps:g}, step {self.t})"
