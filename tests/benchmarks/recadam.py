"""One step of RecAdam against torch's fused AdamW on the same parameters, and bytes of state per parameter.

A step of fused AdamW moves 7 numbers per parameter (reads weight, gradient, m, v; writes weight, m, v); RecAdam must
read the anchor as well: 8/7 = 1.14 is the least that any implementation can reach. `python tests/benchmarks/recadam.py`
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from hf_continual.methods.recadam import RecAdamOptimizer

# A 30 M-parameter slice of a small language model: an embedding and eight blocks.
SHAPES = [(6144, 576)] + 8 * [
    (576, 576),
    (192, 576),
    (192, 576),
    (576, 576),
    (1536, 576),
    (1536, 576),
    (576, 1536),
    (576,),
    (576,),
]
PAIRS = 25


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def seconds(optimizer: torch.optim.Optimizer) -> float:
    begin = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - begin


def state_bytes(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> float:
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim())
    return held / sum(p.numel() for p in params)


def main() -> None:
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = parameters(dtype), parameters(dtype)
        adam = torch.optim.AdamW(a, lr=1e-5, fused=True)
        rec = RecAdamOptimizer(b, lr=1e-5, k=0.1, t0=20)
        for _ in range(3):
            adam.step()
            rec.step()
        ratios = sorted(1 / (seconds(adam) / seconds(rec)) for _ in range(PAIRS))
        print(
            f"RecAdam / torch AdamW(fused=True), {sum(p.numel() for p in a) / 1e6:.0f} M parameters, {dtype}, one thread"
        )
        print(
            f"  step time   {statistics.median(ratios):.2f}   (min {ratios[0]:.2f}, max {ratios[-1]:.2f}, {PAIRS} pairs)"
        )
        print(f"  state       {state_bytes(rec, b):.1f} bytes per parameter, AdamW {state_bytes(adam, a):.1f}")


if __name__ == "__main__":
    main()
