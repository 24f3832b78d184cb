"""Experts for exploring RECALL: trained once, kept on disk, merged and inspected in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_continual.data.columns import cut_prompts, take, without_options
from hf_continual.evaluation.prompts import batches_by_length, encode
from hf_continual.tensors.layers import find_blocks

RANK, ALPHA, MODULES = 8, 16, ("q_proj", "v_proj")
Change = dict[str, torch.Tensor]  # weight's name -> what training added to it


class InFloat(torch.nn.Linear):
    """A layer that stays in float32 inside a model in bfloat16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Like `Linear`; the output has the input's dtype."""
        return torch.nn.functional.linear(input.float(), self.weight).to(input.dtype)


class Workbench:
    """One model in memory whose weights are the base's plus a change.

    Args:
        path: The base.
        tokens: Length to which prompts are cut.
        fast: Compute in bfloat16, except the merged weights and the head; for scoring only.
    """

    def __init__(self, path: str, tokens: int, fast: bool = False) -> None:
        dtype = torch.bfloat16 if fast else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)
        if fast:
            keep_in_float(self.model)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.tokens = tokens
        names = [n for n, _ in self.model.named_parameters() if n.split(".")[-2] in MODULES]
        self.base = {n: self.model.get_parameter(n).clone() for n in names}

    def put(self, change: Change) -> Any:
        """The model with a change; an empty one is the base."""
        for name, base in self.base.items():
            self.model.get_parameter(name).data.copy_(base + change[name] if change else base)
        return self.model

    def shown(self, rows: Any) -> Any:
        """Rows as they are trained on: without the list of options, prompts cut."""
        return cut_prompts(without_options(rows), self.tokens, self.tokenizer)

    def encoded(self, rows: Any) -> list[tuple[list[int], list[int]]]:
        """Tokens of prompts and answers; an answer's last token ends it."""
        return [encode(row, self.tokenizer) for row in rows]


def keep_in_float(model: Any) -> None:
    """Keep merged weights unrounded, and compute losses from float32 logits."""
    for name, module in model.named_modules():
        if name.split(".")[-1] in (*MODULES, "lm_head"):
            module.__class__ = InFloat
            module.weight = torch.nn.Parameter(module.weight.float(), requires_grad=False)


def train(bench: Workbench, start: Change, rows: Any, seed: int, folder: Path, steps: int = 24, batch: int = 4) -> None:
    """A LoRA adapter on the base plus `start`: constant learning rate 2e-3 after 3 steps, loss of the answers only."""
    if (folder / "adapter_model.safetensors").is_file():
        return
    bench.put(start)
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES), task_type="CAUSAL_LM")
    model: Any = get_peft_model(bench.model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    pairs = bench.encoded(bench.shown(take(rows, steps * batch, seed)))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 3)
        loss = answers_loss(bench.model, pairs[step * batch : (step + 1) * batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(folder, f"last loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)  # before unloading it: afterwards there is nothing to save
    bench.model = model.unload()
    bench.model.requires_grad_(False)


def answers_loss(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean loss of the answers' tokens; the head sees only these."""
    width = max(len(p) + len(a) for p, a in pairs)
    ids = torch.tensor([[*p, *a, *[0] * (width - len(p) - len(a))] for p, a in pairs])
    mask = torch.tensor([[1] * (len(p) + len(a)) + [0] * (width - len(p) - len(a)) for p, a in pairs])
    hidden_BSD = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    states = torch.cat([hidden_BSD[i, len(p) - 1 : len(p) + len(a) - 1] for i, (p, a) in enumerate(pairs)])
    return torch.nn.functional.cross_entropy(model.lm_head(states), torch.tensor([t for _, a in pairs for t in a]))


def change_of(folder: Path) -> Change:
    """What an adapter adds, in the base's names."""
    stored = load_file(folder / "adapter_model.safetensors")
    names = [n.removesuffix(".lora_A.weight") for n in stored if n.endswith(".lora_A.weight")]
    return {
        f"{n.removeprefix('base_model.model.')}.weight": ALPHA
        / RANK
        * stored[f"{n}.lora_B.weight"]
        @ stored[f"{n}.lora_A.weight"]
        for n in names
    }


def weighted(changes: Sequence[Change], weights: Mapping[str, Sequence[float]] | Sequence[float]) -> Change:
    """Sum of changes, with weights by the name of the parameter or the same for all."""
    of = weights if isinstance(weights, Mapping) else dict.fromkeys(changes[0], weights)
    return {n: sum(w * c[n] for w, c in zip(of[n], changes, strict=True)) for n in changes[0]}  # type: ignore[misc]


def states(bench: Workbench, change: Change, pairs: Sequence[tuple[list[int], list[int]]], file: Path) -> None:
    """Save a model's representations of texts: of each block and tapped module, four poolings, ``[groups, texts, channels]``."""
    if file.is_file():
        return
    model = bench.put(change)
    # The token that ends an answer is not part of a text: `merge_with_recall` does not see it either.
    texts = [(len(p), [*p, *a[:-1]]) for p, a in pairs]
    found: dict[str, list[Any]] = {}
    with torch.no_grad(), tapped(model) as taken:
        for picked in batches_by_length(texts, [len(t) for _, t in texts], 10):
            batch = [texts[i] for i in picked]
            width = max(len(t) for _, t in batch)
            ids = torch.tensor([[*t, *[0] * (width - len(t))] for _, t in batch])
            mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for _, t in batch])
            taken.clear()
            taken["final"] = [model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state]
            groups = {"block": [*taken["block"], *taken["final"]], "q_proj": taken["q_proj"], "v_proj": taken["v_proj"]}
            for kind, outputs in groups.items():
                for name, pooled in pools(torch.stack(outputs), batch).items():
                    whole = found.setdefault(f"{kind} {name}", [None] * len(texts))
                    for k, i in enumerate(picked):
                        whole[i] = pooled[:, k]
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{k: np.stack(v, axis=1) for k, v in found.items()})  # pyrefly: ignore


def pools(hidden_GBSD: torch.Tensor, batch: Sequence[tuple[int, list[int]]]) -> dict[str, np.ndarray]:
    """Means and last tokens, of the whole texts and of their prompts; ``[groups, batch, channels]`` each."""
    ends = {"text": [len(t) for _, t in batch], "prompt": [p for p, _ in batch]}
    found = {}
    for part, lengths in ends.items():
        each = [hidden_GBSD[:, k, :n] for k, n in enumerate(lengths)]
        found[f"mean {part}"] = torch.stack([h.mean(1) for h in each], 1).numpy()
        found[f"last {part}"] = torch.stack([h[:, -1] for h in each], 1).numpy()
    return found


@contextmanager
def tapped(model: Any) -> Any:
    """Outputs of the blocks (with the input of the first) and of the trained modules, by kind, filled by each pass."""
    taken: dict[str, list[torch.Tensor]] = {}
    blocks = find_blocks(model).modules

    def keep(kind: str, hidden: Any) -> None:
        taken.setdefault(kind, []).append(hidden[0] if isinstance(hidden, tuple) else hidden)

    hooks = [blocks[0].register_forward_pre_hook(lambda m, a, k: keep("block", a[0]), with_kwargs=True)]
    for block in blocks:
        hooks.append(block.register_forward_hook(lambda *a: keep("block", a[2])))
        for name in MODULES:
            module = getattr(block.self_attn, name)
            hooks.append(module.register_forward_hook(lambda m, a, out, kind=name: keep(kind, out)))
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()
