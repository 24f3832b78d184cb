"""Big checkpoints of random weights, written a tensor at a time; and a watched merge of them. Imports nothing heavy.

python -m tests.merging.synthetic merge_linear OUT MODEL MODEL      prints seconds, memory and imports as JSON
python -m tests.merging.synthetic ties OUT BASE MODEL MODEL         any merge of the table; NAME! watches no memory
"""

from __future__ import annotations

import importlib
import json
import re
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}

# Options with which each merge of the table is measured: those of its paper, or ones that cost as much.
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"weights": [0.4, 0.6]},
    "task_arithmetic": {"scale": 0.5},
    "ties": {"density": 0.2},
    "dare": {"density": 0.3, "scale": 0.5},
    "dare_ties": {"density": 0.3},
    "della": {"density": 0.3, "epsilon": 0.14},
    "breadcrumbs": {"density": 0.1, "outliers": 0.01, "scale": 0.3},
    "consensus": {"scale": 0.3},
    "fapm": {"density": 0.1, "scale": 0.5},
    "magnitude_max": {},
    "slerp": {"t": 0.4},
    "model_stock": {},
}
WITHOUT_BASE = ("linear", "slerp")


def anonymous() -> int:
    """Bytes of anonymous memory of this process: memory that cannot be dropped. Mapped files count elsewhere."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def shapes(hidden: int, inner: int, layers: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """A Llama's tensors."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        found |= {p + f"self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        found |= {p + f"mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        found |= {p + "mlp.down_proj.weight": (hidden, inner)}
        found |= {p + f"{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_model(
    folder: Path,
    seed: int,
    layers: int,
    hidden: int = 1024,
    inner: int = 4096,
    vocab: int = 32_000,
    sparse: bool = False,
) -> int:
    """A bf16 checkpoint in one file, its bytes written one tensor at a time, or as a hole; returns its elements."""
    import torch

    folder.mkdir(parents=True)
    config = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config, "num_attention_heads": 16}))
    entries, end, elements = {}, 0, 0
    for name, shape in shapes(hidden, inner, layers, vocab).items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end, elements = end + size, elements + size // 2
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    torch.manual_seed(seed)
    block = torch.randn(1 << 22).mul_(0.02).bfloat16().view(torch.uint8).numpy()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        if sparse:
            file.truncate(8 + len(header) + end)
            return elements
        for start in range(0, end, len(block)):
            file.write(memoryview(block)[: min(len(block), end - start)])
    return elements


def write_adapter(folder: Path, size: dict[str, int], rank: int = 16) -> None:
    """A LoRA adapter of random factors on every linear layer of the blocks."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, shape in shapes(**size).items():
        if name.endswith("_proj.weight"):
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, shape[1]).mul_(0.01).bfloat16()
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], rank).mul_(0.01).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({n.removesuffix(".lora_A.weight").rpartition(".")[2] for n in tensors if "lora_A" in n})
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(told))


class Watch(threading.Thread):
    """The highest anonymous memory over time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._stop_it = anonymous(), threading.Event()

    def run(self) -> None:
        """Sample every two milliseconds."""
        while not self._stop_it.wait(0.002):
            self.peak = max(self.peak, anonymous())

    def stop(self) -> int:
        """The highest sample."""
        self._stop_it.set()
        self.join()
        return max(self.peak, anonymous())


def called(function: str, out: str, models: list[str]) -> Any:
    """One merge: a function of the package, or a merge of the table, whose first model is the base."""
    face = importlib.import_module("hf_continual")
    if function in OPTIONS:
        based = {} if function in WITHOUT_BASE else {"base": models[0]}
        return face.merge(function, models[len(based) :], out, progress=False, **based, **OPTIONS[function])
    if function == "adapter":
        return face.merge_linear(models[1:], out, base=models[0], output="model", progress=False)
    options = {"weights": {"default": [0.4, 0.6]}} if function == "merge_with_recall" else {"weights": [0.4, 0.6]}
    return getattr(face, function)(models, out, progress=False, **options)


def watched(function: str, out: str, models: list[str], watch_memory: bool = True) -> dict[str, Any]:
    """Run a merge and return what it took on top of `import torch`; watching the memory costs CPU time itself."""
    import torch

    torch.set_num_threads(1)
    before = anonymous()
    watch = Watch()
    if watch_memory:
        watch.start()
    started, cpu = time.perf_counter(), time.process_time()
    result = called(function, out, models)
    return {
        "written in": result.seconds["merge"],
        "wall": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "memory": watch.stop() - before if watch_memory else None,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "torch": before,
        "imported": [m for m in ("transformers", "peft", "sklearn", "datasets", "trl") if m in sys.modules],
        "bytes": result.bytes_written,
    }


if __name__ == "__main__":
    asked, *rest = sys.argv[1:]
    if asked == "write adapter":
        write_adapter(Path(rest[0]), json.loads(rest[1]))
        sys.exit()
    sys.stdout.write(json.dumps(watched(asked.removesuffix("!"), rest[0], rest[1:], not asked.endswith("!"))))
