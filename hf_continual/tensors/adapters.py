"""Remove adapters from modules, so that a saved adapter loads as it was trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from hf_continual.tensors.flat import local


def adapters_below(model: PeftModel, modules: dict[str, nn.Module]) -> dict[str, BaseTunerLayer]:
    """Adapter layers inside some modules, by their name in the base model.

    Adapters on parameters (`target_parameters`) are nested, one inside another for each parameter of a module; the
    outermost represents all of them.
    """
    inside = {id(m) for module in modules.values() for m in module.modules()}
    found: dict[str, BaseTunerLayer] = {}
    for name, module in model.get_base_model().named_modules():
        within = any(name.startswith(outer + ".") for outer in found)
        if id(module) in inside and isinstance(module, BaseTunerLayer) and not within:
            found[name] = module
    return found


def is_fresh(layer: Any) -> bool:
    """Whether an adapter has learned nothing: one factor of its product is all zero.

    An adapter without such a factor (initialised from the weights, or already trained) is not fresh. One on the
    meta device holds no values and counts as fresh: it is checked before anything is loaded. Nested adapters must all
    be fresh.
    """
    zero = [
        p.is_meta or not bool(p.detach().any())
        for name, p in layer.named_parameters()
        if ("lora_B" in name or "lora_embedding_A" in name) and "bias" not in name
    ]
    magnitude = any("lora_magnitude_vector" in name for name, _ in layer.named_parameters())
    return bool(zero) and all(zero) and not magnitude


FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")


def factor_pairs(params: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Names of the factors A and B among some parameters, by the linear layer that they adapt."""
    found: dict[tuple[str, str | None], dict[str, str]] = {}
    for name in params:
        if match := FACTOR.match(name):
            found.setdefault((match["layer"], match["adapter"]), {})[match["factor"]] = name
    return {layer: (pair["A"], pair["B"]) for (layer, _), pair in found.items() if len(pair) == 2}


def fresh_factors(params: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the factors of adapters that have learned nothing: B is all zero."""
    pairs = factor_pairs(params).values()
    return {name for pair in pairs if not bool(local(params[pair[1]].detach()).any()) for name in pair}


def remove_adapters(model: PeftModel, layers: dict[str, BaseTunerLayer]) -> None:
    """Put the plain module back in place of adapter layers, and record it in the adapters' configurations.

    Modules are excluded by name. Parameters cannot be excluded, so `target_parameters` is spelled out: the full names
    of those that keep their adapter.

    Args:
        model: The model whose adapter configurations are changed.
        layers: Outermost adapter layers by their name in the base model, see `adapters_below`.
    """
    if not layers:
        return
    base = model.get_base_model()
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, layer.get_base_layer())
    modules = [name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)]
    for config in model.peft_config.values():
        if modules:
            _exclude(config, modules)
        if getattr(config, "target_parameters", None) and len(modules) < len(layers):
            config.target_parameters = sorted(set(_adapted_parameters(base)))  # pyrefly: ignore


def _exclude(config: Any, modules: list[str]) -> None:
    before = getattr(config, "exclude_modules", None)
    if isinstance(before, str):
        config.exclude_modules = "|".join([f"(?:{before})", *map(re.escape, modules)])
    else:
        config.exclude_modules = sorted({*(before or ()), *modules})


def _adapted_parameters(base: nn.Module) -> Iterator[str]:
    """Full names of the parameters that have their own adapter."""
    for name, module in base.named_modules():
        if isinstance(module, ParamWrapper):
            yield f"{name.replace('.base_layer', '')}.{module.parameter_name}"


def trainable_rows(module: nn.Module) -> Iterator[nn.Parameter]:
    """The rows of embeddings that the adapter's `trainable_token_indices` lists, if they are trained."""
    for wrapper in module.modules():
        if isinstance(wrapper, TrainableTokensWrapper):
            yield from (p for n, p in wrapper.named_parameters() if "trainable_tokens_delta" in n and p.requires_grad)


def has_fresh_copy(module: nn.Module) -> bool:
    """Whether the adapter's `modules_to_save` holds a copy of the module that is not trained yet."""
    for wrapper in module.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            original = list(wrapper.original_module.parameters())
            for copy in wrapper.modules_to_save.values():
                pairs = list(zip(copy.parameters(), original, strict=True))
                if not any(a.is_meta or a.numel() == 0 for a, _ in pairs) and all(a.equal(b) for a, b in pairs):
                    return True
    return False


def adapter_names(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The name under which PEFT saves each parameter of a model's adapters.

    PEFT itself is called, with numbers in place of the tensors, so that every kind of adapter is covered: custom names,
    several adapters, modules_to_save, magnitudes, trained tokens.

    Args:
        model: A model, with adapters or without.

    Returns:
        Parameter -> (adapter, name in the adapter's file).
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    numbers = {name: torch.tensor(i) for i, name in enumerate([*names, *buffers])}
    found: dict[str, tuple[str, str]] = {}
    for adapter in getattr(model, "peft_config", {}):
        saved = get_peft_model_state_dict(model, numbers, adapter, save_embedding_layers=False)
        found |= {names[int(i)]: (adapter, key) for key, i in saved.items() if i.ndim == 0 and int(i) < len(names)}
    return found
