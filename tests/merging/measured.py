"""The memory that writing a merge takes, against the limit in its plan; run as a script, one case per process.

python -m tests.merging.measured FOLDER CASE      prints bytes as JSON: bound, taken
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.merging.synthetic import Watch, anonymous, shapes, write_model

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# name -> ranks of the adapters, whether they have DoRA, options
CASES: dict[str, tuple[tuple[int, ...], bool, dict[str, Any]]] = {
    "two adapters into a model": ((128, 128), False, {"output": "model"}),
    "two adapters, exact sum": ((128, 128), False, {}),
    "two adapters, truncated": ((128, 128), False, {"adapter_rank": 8}),
    "DoRA": ((32,), True, {"output": "model"}),
    "what it saw in 4 bits": ((2,), False, {"output": "model", "quantized_base": NF4}),
    "what it saw in 8 bits": ((2,), False, {"output": "model", "quantized_base": {"load_in_8bit": True}}),
    "DoRA on what it saw": ((2,), True, {"output": "model", "quantized_base": NF4}),
}
SIZE = {"hidden": 768, "inner": 3072, "layers": 1, "vocab": 12_000}


def write_world(folder: Path) -> None:
    """A base and the adapters of all cases, on every linear layer and the head."""
    import torch
    from safetensors.torch import save_file

    write_model(folder / "base", 0, **SIZE)
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 16}))
    wanted = {(r, dora, i) for ranks, dora, _ in CASES.values() for i, r in enumerate(ranks)}
    for rank, dora, number in sorted(wanted):
        tensors = {}
        for name, shape in shapes(**SIZE).items():
            if len(shape) == 2 and "embed" not in name:
                module = "base_model.model." + name.removesuffix(".weight")
                tensors[f"{module}.lora_A.weight"] = torch.randn(rank, shape[1]) * 0.01
                tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], rank) * 0.01
                if dora:
                    tensors[f"{module}.lora_magnitude_vector"] = torch.ones(shape[0])
        place = folder / adapter_name(rank, dora, number)
        place.mkdir()
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        modules = sorted({n.removesuffix(".lora_A.weight").rpartition(".")[2] for n in tensors if "lora_A" in n})
        told = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "use_dora": dora}
        (place / "adapter_config.json").write_text(json.dumps(told))


def adapter_name(rank: int, dora: bool, number: int) -> str:
    """Folder of an adapter."""
    return f"r{rank}-{'dora' if dora else 'lora'}-{number}"


def main() -> None:
    """Merge, and print the stated limit and the memory taken."""
    import torch

    from hf_continual import merge_linear
    from hf_continual.merging import pipeline
    from hf_continual.merging.engine.shards import memory_bound

    torch.set_num_threads(1)
    folder, (ranks, dora, options) = Path(sys.argv[1]), CASES[sys.argv[2]]
    found, write = {}, pipeline.write_shards

    def watched(shards: Any, *args: Any) -> Any:
        found["bound"], before = memory_bound(shards), anonymous()
        watch = Watch()
        watch.start()
        written = write(shards, *args)
        found["taken"] = watch.stop() - before
        return written

    pipeline.write_shards = watched
    adapters = [folder / adapter_name(r, dora, i) for i, r in enumerate(ranks)]
    out = folder / f"out {sys.argv[2]}"
    merge_linear(adapters, out, base=folder / "base", progress=False, **options)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
