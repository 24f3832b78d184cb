"""A training step with frozen bottom blocks as a fraction of the full step, against the expected operation counts.

Per block the forward pass costs 1, the backward pass 2 and, with gradient checkpointing, the recomputation 1 more.
Below the first trainable block only the forward pass is left. `python tests/benchmarks/freeze.py`
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_continual.methods.freeze import FreezeLayers
from hf_continual.tasks import Task

BLOCKS, PAIRS, BATCH, LENGTH, VOCABULARY = 12, 7, 4, 128, 512
CONFIG = {
    "vocab_size": VOCABULARY, "hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 5, "num_key_value_heads": 5,
}  # fmt: skip


class Step:
    """Forward, backward and optimizer step of a model of about 17 M parameters."""

    def __init__(self, bottom: int, checkpointing: bool) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**CONFIG)).train()
        if bottom:
            method = FreezeLayers(bottom=bottom)
            method.prepare_model(self.model, Task())
        if checkpointing:
            self.model.activation_checkpointing_enable()
        if bottom:
            method.begin_task(None)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        self.ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))

    def __call__(self) -> float:
        begin = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin


def expected(bottom: int, checkpointing: bool) -> float:
    """Fraction of the full step, counting the matrix products of blocks and head."""
    h, f = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    block = 4 * h * h + 3 * h * f + LENGTH * h  # per token; attention over half the length on average, twice
    head = h * VOCABULARY
    once = 4 if checkpointing else 3
    full = BLOCKS * block * once + 3 * head
    return (bottom * block + (BLOCKS - bottom) * block * once + 3 * head) / full


def peak(bottom: int, checkpointing: bool) -> float:
    """Peak memory of a process that makes three steps, on top of what it held before the model was built, in MB."""
    source = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.benchmarks.freeze import Step, resident\n"
        "import torch; torch.set_num_threads(1)\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # forget the peak of the imports (Linux)
        "begin = resident('VmRSS')\n"
        f"step = Step({bottom}, {checkpointing})\n"
        "for _ in range(3): step()\n"
        "print(resident('VmHWM') - begin)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def resident(what: str) -> float:
    """Resident memory of this process, now or at its peak, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def main() -> None:
    torch.set_num_threads(1)
    print(
        f"FreezeLayers(bottom=n) / all trainable, {BLOCKS} blocks, batch {BATCH} x {LENGTH}, one thread, {PAIRS} pairs"
    )
    for checkpointing in (False, True):
        full = Step(0, checkpointing)
        full()
        whole = peak(0, checkpointing)
        for bottom in (BLOCKS // 2, 3 * BLOCKS // 4):
            frozen = Step(bottom, checkpointing)
            frozen()
            measured = statistics.median(frozen() / full() for _ in range(PAIRS))
            model = expected(bottom, checkpointing)
            share = peak(bottom, checkpointing) / whole
            print(
                f"  n = {bottom}, checkpointing {'on ' if checkpointing else 'off'}: step {measured:.3f}, operations "
                f"{model:.3f} ({100 * (measured / model - 1):+.0f} %); peak memory {share:.2f} of {whole:.0f} MB"
            )


if __name__ == "__main__":
    main()
