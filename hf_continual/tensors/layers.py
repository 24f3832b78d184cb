"""Read a model's structure: which modules are the blocks, and which run before them. One place for all architectures.

Everything is found by module structure and by the order in which modules run. Names differ between architectures
(`model.layers`, `transformer.h`, `gpt_neox.layers`) and mislead: a substring test finds block 10 when block 1 is
meant, and the `embedding_norm` of LFM2 is the norm after its last block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_continual.tensors.modes import evaluation_mode
from hf_continual.tensors.whole import elements


@dataclass(frozen=True)
class Blocks:
    """The stack of decoder blocks of a model.

    Args:
        path: Name of the list in the model it was found in, such as ``"model.layers"``.
        modules: The blocks from the input upwards.
    """

    path: str
    modules: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.modules)


def find_blocks(model: nn.Module) -> Blocks:
    """Find the decoder blocks: the outermost list of modules that is closest to the token embedding.

    Lists inside a block (the experts of a mixture) are not outermost. The stacks of vision and audio towers are
    farther from the token embedding than the text model's; of several lists at the same distance, the one with most
    parameters is taken.

    Args:
        model: A causal language model, with or without adapters.

    Returns:
        The blocks with their path below `model`.

    Raises:
        ValueError: If the model has no list of modules.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not inside:
            found[name] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks (nn.ModuleList), so its layers cannot be counted. "
            f"Name the parameters yourself with requires_grad_(False)."
        )
    vision = ("vision", "visual", "audio", "image")
    text = {name: blocks for name, blocks in found.items() if not any(word in name.lower() for word in vision)}
    embedding = next(iter(input_embeddings(model)), "")

    def nearest(item: tuple[str, nn.ModuleList]) -> tuple[int, int]:
        return _shared(item[0], embedding), sum(elements(p) for p in item[1].parameters())

    path, blocks = max((text or found).items(), key=nearest)
    return Blocks(path, tuple(blocks))


def _shared(one: str, other: str) -> int:
    """Number of leading components that two dotted names share."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def input_embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """Input embeddings declared by the model and the models inside it (text model, vision tower), by name.

    Args:
        model: A model, with or without adapters.

    Returns:
        Modules by name, the one of `model` itself first; empty if a module declares none.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for module in model.modules():
        ask: Any = getattr(module, "get_input_embeddings", None)
        if ask is None:
            continue
        try:
            embedding = ask()
        except NotImplementedError:
            continue
        if isinstance(embedding, nn.Module) and id(embedding) in names:
            found.setdefault(names[id(embedding)], embedding)
    return found


class _FirstBlock(Exception):
    """Raised when the first block is reached."""


def modules_below(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that run before the first block when the model reads text, by name.

    Token and position embeddings, and whatever normalises, projects or adds to them. The model is run on two tokens up
    to its first block. If it cannot be run (its weights are on the meta device or sharded over processes), the modules
    found by name are returned, see `embedding_modules`.

    Args:
        model: A causal language model, with or without adapters.

    Returns:
        The outermost modules with parameters; none of them is a tower, or holds the blocks or the head.
    """
    blocks = find_blocks(model)
    above = {blocks.path.rsplit(".", i)[0] for i in range(blocks.path.count(".") + 1)} | {""}
    ran: dict[str, nn.Module] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: ran.setdefault(name, m) and None)
        for name, module in model.named_modules()
        if name not in above and not name.startswith(blocks.path + ".") and _has_parameters(module)
    ]
    try:
        hooks.append(blocks.modules[0].register_forward_pre_hook(_stop))
        with evaluation_mode(model), torch.no_grad():  # dropout of embeddings must not draw
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=_device(model)), use_cache=False)
    except _FirstBlock:
        outermost = {n: m for n, m in ran.items() if not any(n.startswith(outer + ".") for outer in ran)}
        return {name: module for name, module in outermost.items() if not is_tower(module)}
    except Exception:  # whatever a model raises if it cannot be run here
        return embedding_modules(model)
    finally:
        for hook in hooks:
            hook.remove()
    return embedding_modules(model)


def _stop(module: nn.Module, args: Any) -> None:
    raise _FirstBlock


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _device(model: nn.Module) -> torch.device:
    embedding = next(iter(input_embeddings(model).values()), model)
    return next(embedding.parameters()).device


def embedding_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules below the first block that turn token ids into its input, as far as names tell.

    Token and position embeddings wherever they are, and a norm or projection of embeddings (BLOOM's
    `word_embeddings_layernorm`, OPT's `project_in`), which are siblings of the blocks with "embed" in their name, or
    the projection into the stack.

    Args:
        model: A causal language model, with or without adapters.

    Returns:
        Modules by name; none of them is inside a block or is the language-model head.
    """
    blocks = find_blocks(model).path
    parent = blocks.rpartition(".")[0]
    found: dict[str, nn.Module] = {}
    beside = tuple(f"{name}." for name in towers(model))
    for name, module in model.named_modules():
        if name.startswith((f"{blocks}.", *beside)) or any(name.startswith(f + ".") for f in found):
            continue
        if isinstance(module, nn.Embedding):
            found[name] = module
        elif name.rpartition(".")[0] == parent and name != parent:
            last = name.rpartition(".")[2]
            if any(True for _ in module.parameters(recurse=False)) and ("embed" in last or last == "project_in"):
                found[name] = module
    return found


def towers(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters that only rows with images or sound train: vision and audio towers, and their projections.

    They are siblings of the text model if the configuration lists one, or siblings of the blocks with their own stack
    of blocks.

    Args:
        model: A causal language model, with or without adapters.

    Returns:
        Parameters by the name of the module, or of the parameter if it is in no module.
    """
    stack = find_blocks(model).path.rpartition(".")[0]
    found = {f"{stack}.{n}".removeprefix("."): m for n, m in model.get_submodule(stack).named_children() if is_tower(m)}
    config: Any = getattr(model, "config", None)
    parameters: dict[str, list[nn.Parameter]] = {}
    if hasattr(config, "get_text_config") and config.get_text_config() is not config:
        kept = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}  # pyrefly: ignore[not-callable]
        outer = ["", *(stack.rsplit(".", i)[0] for i in range(stack.count("."), 0, -1))]
        for name in outer:
            module, start = model.get_submodule(name), name and f"{name}."
            beside = {f"{start}{n}": m for n, m in module.named_children() if id(m) not in kept}
            found |= {n: m for n, m in beside.items() if n != stack and not stack.startswith(f"{n}.")}
            parameters |= {f"{start}{n}": [p] for n, p in module.named_parameters(recurse=False)}
    return parameters | {name: list(module.parameters()) for name, module in found.items() if _has_parameters(module)}


def is_tower(module: nn.Module) -> bool:
    """Whether a module has its own stack of blocks: a vision tower does, an embedding does not."""
    return not isinstance(module, nn.ModuleList) and any(isinstance(m, nn.ModuleList) for m in module.modules())


def in_attention(model: nn.Module) -> set[str]:
    """Names of the parameters inside attention modules of the model's blocks; adapters on them count.

    In transformers every such class has "Attention" in its name, whatever the model calls the module.
    """
    blocks = find_blocks(model).path
    return {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if name.startswith(f"{blocks}.") and "attention" in type(module).__name__.lower()
        for inner, _ in module.named_parameters()
    }


def is_tied(model: nn.Module) -> bool:
    """Whether the language-model head and the input embedding share one matrix."""
    head = model.get_output_embeddings()  # pyrefly: ignore[not-callable]
    embedding = model.get_input_embeddings()  # pyrefly: ignore[not-callable]
    return head is not None and head.weight is embedding.weight


def untie(model: nn.Module) -> None:
    """Give the language-model head its own copy of the embedding matrix.

    Args:
        model: A causal language model whose head is tied to its embeddings.

    Raises:
        ValueError: If an adapter ties copies of both, or the matrix is sharded over processes.
    """
    head = model.get_output_embeddings()  # pyrefly: ignore[not-callable]
    head = getattr(head, "base_layer", head)  # below LoRA
    if "weight" not in head._parameters:
        raise ValueError(
            f"cannot untie the language-model head: it is a {type(head).__name__}, whose copy the adapter ties to that of "
            f"the embeddings (ensure_weight_tying=True). Use LoraConfig(modules_to_save=['lm_head']) without "
            f"ensure_weight_tying, which trains the head alone."
        )
    if not head.weight.numel() and elements(head.weight):
        raise ValueError(
            "cannot untie the language-model head: ZeRO-3 has sharded its matrix over the processes. Use ZeRO-2, DDP or FSDP2, "
            "or embeddings=True, which freezes the head with the embeddings."
        )
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False  # pyrefly: ignore
