"""Reading a model's structure: which modules are the blocks, which come before them. One place for all architectures.

Everything is found by module structure. Parameter names differ between architectures (`model.layers`,
`transformer.h`, `gpt_neox.layers`) and a substring test on them finds block 10 when block 1 is meant.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


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
    """Find the decoder blocks: the outermost list of modules that holds most parameters.

    Lists inside a block (the experts of a mixture) are not outermost; the smaller stack of a vision
    tower holds fewer parameters than the text model's, and is passed over where the text model is known.

    Args:
        model: A causal language model, with or without adapters.

    Returns:
        The blocks with their path below `model`.

    Raises:
        ValueError: If the model holds no list of modules.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not inside:
            found[name] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no list of blocks (nn.ModuleList), so its layers cannot be counted. "
            f"Name the parameters yourself with requires_grad_(False)."
        )
    vision = ("vision", "visual", "audio", "image")
    text = {name: blocks for name, blocks in found.items() if not any(word in name.lower() for word in vision)}
    path, blocks = max((text or found).items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return Blocks(path, tuple(blocks))


def embedding_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules below the first block that turn token ids into its input, by name.

    Token and position embeddings wherever they hang, and a norm or projection of embeddings (BLOOM's
    `word_embeddings_layernorm`, OPT's `project_in`), which lie beside the blocks under a name with "embed" or
    as the projection into the stack.

    Args:
        model: A causal language model, with or without adapters.

    Returns:
        Modules by name; none of them lies inside a block or is the language-model head.
    """
    blocks = find_blocks(model).path
    parent = blocks.rpartition(".")[0]
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name == blocks or name.startswith(blocks + ".") or any(name.startswith(f + ".") for f in found):
            continue
        if isinstance(module, nn.Embedding):
            found[name] = module
        elif name.rpartition(".")[0] == parent and name != parent:
            last = name.rpartition(".")[2]
            beside = any(True for _ in module.parameters(recurse=False)) and ("embed" in last or last == "project_in")
            if beside:
                found[name] = module
    return found


def is_tied(model: nn.Module) -> bool:
    """Whether the language-model head and the input embedding are one matrix."""
    head = model.get_output_embeddings()  # pyrefly: ignore[not-callable]
    embedding = model.get_input_embeddings()  # pyrefly: ignore[not-callable]
    return head is not None and head.weight is embedding.weight
