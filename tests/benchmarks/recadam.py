"""One step of RecAdam against torch's fused AdamW on the same parameters, and bytes of state per parameter.

A step of fused AdamW moves 7 numbers per parameter (reads weight, gradient, m, v; writes weight, m, v); RecAdam must
read the anchor as well: 8/7 = 1.14 is the lower bound for any implementation with `pull_every=1`. In bf16 AdamW
keeps its moments in bf16 and loses rounding errors; RecAdam computes in fp32, exactly.

Processor time of one thread, pairs of steps in turns, so that other processes on the machine matter little.
`python tests/benchmarks/recadam.py [ROUNDS]`
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
ROUNDS, STEPS = 25, 8  # a round is as many steps of each, a whole window of the longest `pull_every`


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def seconds(optimizer: torch.optim.Optimizer) -> float:
    begin = time.process_time()
    for _ in range(STEPS):
        optimizer.step()
    return time.process_time() - begin


def state_bytes(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> float:
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim())
    return held / sum(p.numel() for p in params)


def compare(dtype: torch.dtype, every: int, rounds: int) -> None:
    a, b = parameters(dtype), parameters(dtype)
    adam = torch.optim.AdamW(a, lr=1e-5, fused=True)
    rec = RecAdamOptimizer(b, lr=1e-5, k=0.1, t0=20, pull_every=every)
    seconds(adam), seconds(rec)
    ratios = sorted(1 / (seconds(adam) / seconds(rec)) for _ in range(rounds))
    print(
        f"  {str(dtype).removeprefix('torch.'):8}  pull_every={every}  step time {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})  state {state_bytes(rec, b):.1f} bytes per parameter, AdamW "
        f"{state_bytes(adam, a):.1f}",
        flush=True,
    )


def main() -> None:
    torch.set_num_threads(1)
    rounds = max(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS, 9)
    number = sum(p.numel() for p in parameters(torch.float32)) / 1e6
    print(f"RecAdam / torch AdamW(fused=True), {number:.0f} M parameters, one thread, {rounds} rounds of {STEPS} steps")
    for dtype in (torch.float32, torch.bfloat16):
        for every in (1, 8):
            compare(dtype, every, rounds)


if __name__ == "__main__":
    main()
