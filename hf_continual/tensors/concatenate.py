"""Add LoRA adapters exactly: factors side by side, never averaged.

(s_1 B_1 A_1 + s_2 B_2 A_2) x = [s_1 B_1, s_2 B_2] [A_1; A_2] x, so two adapters of rank r_1 and r_2 are one of rank
r_1 + r_2 and scaling 1. The only rounding is in s B, and none if s is a power of two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"^(?P<module>.*)\.(?P<kind>lora|lora_embedding)_(?P<factor>[AB])(?P<rest>\.weight)?$")


def scaling(config: Mapping[str, Any], module: str) -> float:
    """The factor of B A in a module, as PEFT computes it from an adapter's configuration."""
    rank, name = rank_of(config, module), module.removeprefix("base_model.model.")
    alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank that an adapter's configuration gives a module."""
    return _pattern(config.get("rank_pattern"), module.removeprefix("base_model.model."), config["r"])


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def check_plain_lora(config: dict[str, Any], folder: Path) -> None:
    """Refuse adapters that are more than B A.

    Args:
        config: The adapter's configuration.
        folder: Where it is, for the message.

    Raises:
        ValueError: If it is not a LoRA adapter, or has parts that cannot be added.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds a {config.get('peft_type')} adapter; only LoRA adapters can be added.")
    for key in ("use_dora", "modules_to_save", "trainable_token_indices"):
        if config.get(key):
            raise ValueError(
                f"{folder} has {key}={config[key]!r}, which cannot be added to another adapter. Train without it."
            )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{folder} trains biases (bias={config['bias']!r}), which cannot be added. Use bias='none'.")


def concatenate_adapters(first: Path, second: Path, out: Path) -> None:
    """Write one LoRA adapter that equals two together.

    Args:
        first: Folder of an adapter.
        second: Folder of another on the same base model.
        out: Folder for the sum; created if missing.

    Raises:
        ValueError: If one is not a plain LoRA adapter, lacks factors it should have, or both contain different weights
            of an embedding.
    """
    sides, own = [], []
    for folder in (first, second):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        check_plain_lora(config, folder)
        loaded = load_file(folder / WEIGHTS)
        own.append({n: t for n, t in loaded.items() if n.endswith(".base_layer.weight")})
        sides.append((config, _pairs(loaded, folder)))
    tensors = _rows_of_both(own, (first, second))
    ranks: dict[str, int] = {}
    for module in sorted({m for _, pairs in sides for m in pairs}):
        parts = [(scaling(config, module), pairs[module]) for config, pairs in sides if module in pairs]
        names = parts[0][1]
        tensors[names["A"][0]] = torch.cat([p["A"][1] for _, p in parts], dim=0).contiguous()
        tensors[names["B"][0]] = (
            torch.cat([s * p["B"][1].float() for s, p in parts], dim=1).to(names["B"][1].dtype).contiguous()
        )
        ranks[module.removeprefix("base_model.model.")] = tensors[names["A"][0]].shape[0]
    config = dict(sides[1][0])
    most = max(ranks.values())
    different = {re.escape(m): r for m, r in ranks.items() if r != most}
    config |= {
        "r": most,
        "lora_alpha": most,
        "rank_pattern": different,
        "alpha_pattern": dict(different),
        "use_rslora": False,
    }
    config |= {
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "exclude_modules": None,
    }
    config["layers_to_transform"] = config["layers_pattern"] = None
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _rows_of_both(own: list[dict[str, Tensor]], folders: tuple[Path, Path]) -> dict[str, Tensor]:
    """Weights of adapted embeddings in the adapters' files; PEFT loads them in place of the base's."""
    for name in own[0].keys() & own[1].keys():
        if not torch.equal(own[0][name], own[1][name]):
            raise ValueError(
                f"{folders[0]} and {folders[1]} contain different weights as {name!r}: what they learned was "
                f"learned on two different embeddings, and cannot be added. Start both from one resized model."
            )
    return {**own[0], **own[1]}


def _pairs(tensors: dict[str, Tensor], folder: Path) -> dict[str, dict[str, tuple[str, Tensor]]]:
    pairs: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if name.endswith(".base_layer.weight"):
            continue  # an embedding's own weights, which PEFT stores next to its adapter
        if (found := _FACTOR.match(name)) is None:
            raise ValueError(f"{folder} holds {name!r}, which is not a LoRA factor and cannot be added.")
        pairs.setdefault(found["module"], {})[found["factor"]] = (name, tensor)
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{folder} has only one LoRA factor of {module}.")
    return pairs
