"""Map weights to output neurons, and sum how strongly the neurons respond in the forward passes of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class MaskedWeight:
    """A weight whose dimension `dim` indexes the output neurons of a module.

    Args:
        module: The module whose output is summed, neurons in the last dimension.
        param: The weight.
        dim: Dimension of the weight that indexes the neurons.
    """

    module: nn.Module
    param: nn.Parameter
    dim: int = 0


def masked_weights(model: nn.Module, factors_a: bool = False) -> list[MaskedWeight]:
    """The trained weights of a model's linear layers, with the modules that produce their output neurons.

    Args:
        model: The unwrapped model, with or without adapters.
        factors_a: Whether LoRA's A is listed too, with the outputs A x.

    Returns:
        For LoRA layers the factors B with the combined output; for others the weight itself. Not the language-model
        head.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    inside = {id(part) for m in model.modules() if isinstance(m, LoraLayer) for part in m.modules() if part is not m}
    of_head = {id(part) for part in head.modules()} if head is not None else set()
    found: list[MaskedWeight] = []
    for module in model.modules():
        if id(module) in of_head:
            continue
        if isinstance(module, LoraLayer):
            factors: list[tuple[Any, Any]] = [(module.lora_A[n], b) for n, b in module.lora_B.items() if _is_linear(b)]
            found += [MaskedWeight(module, b.weight) for _, b in factors]
            found += [MaskedWeight(a, a.weight) for a, _ in factors] if factors_a else []
        elif id(module) not in inside and _is_linear(module):
            found.append(MaskedWeight(module, module.weight, 1 if _is_transposed(module) else 0))  # pyrefly: ignore
    return [w for w in found if w.param.requires_grad]


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (isinstance(module, nn.Linear) or _is_transposed(module)) and isinstance(weight, nn.Parameter)


def _is_transposed(module: nn.Module) -> bool:
    """GPT-2's linear layer has its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and getattr(module, "nf", None) is not None


class OutputSums:
    """Magnitudes of output neurons, summed over the tokens of the forward passes that are counted.

    A forward pass is recorded while the model's own `forward` runs: what gradient checkpointing recomputes in the
    backward pass is not. It counts once `count` is called, so that passes outside training are dropped.

    Args:
        model: The unwrapped model.
        weights: See `masked_weights`; several of one module share its sums.
        device: Device of the batches.
    """

    def __init__(self, model: nn.Module, weights: Sequence[MaskedWeight], device: torch.device) -> None:
        by_module: dict[nn.Module, list[MaskedWeight]] = {}
        for weight in weights:
            by_module.setdefault(weight.module, []).append(weight)
        alike: dict[int, list[nn.Module]] = {}
        for module, members in by_module.items():
            alike.setdefault(members[0].param.shape[members[0].dim], []).append(module)
        self._by_module = by_module
        self._alike = [(size, modules) for size, modules in sorted(alike.items())]
        total = sum(size * len(modules) for size, modules in self._alike)
        # One buffer: one reduction over processes, and one kernel to count or to clear.
        self._counted, self._heard = torch.zeros(2, total, device=device)
        self._views: dict[nn.Module, Tensor] = {}
        start = 0
        for size, modules in self._alike:
            for module in modules:
                self._views[module] = self._heard[start : start + size]
                start += size
        self._listening, self._passes = False, 0
        self._mask_BS: Tensor | None = None
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            *(module.register_forward_hook(self._hear) for module in self._views),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._listening = module.training
        if self._listening:
            self._heard.zero_()
            mask = kwargs.get("attention_mask")
            self._mask_BS = mask if torch.is_tensor(mask) and mask.dim() == 2 else None

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._listening = False

    @torch.no_grad()
    def _hear(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._listening:
            return
        values = (output[0] if isinstance(output, tuple) else output).detach()
        mask = self._mask_BS
        if (
            mask is not None and values.dim() == 2 and values.shape[0] == mask.numel()
        ):  # a router sees all tokens in one row
            mask = mask.flatten()
        if mask is not None and values.shape[:-1] == mask.shape:
            values = values * mask.unsqueeze(-1).to(values.dtype)
        # The 1-norm of each column: no tensor of magnitudes is made.
        summed = torch.linalg.vector_norm(values.flatten(0, -2), ord=1, dim=0, dtype=torch.float32)
        self._views[module] += summed.to(self._heard.device)

    def count(self) -> None:
        """Count the forward pass that was recorded last."""
        self._counted += self._heard
        self._heard.zero_()
        self._passes += 1

    def groups(self, add_up: Callable[[Tensor], Tensor]) -> Iterator[tuple[list[MaskedWeight], Tensor]]:
        """Sums of the step over all processes, by number of output neurons.

        Args:
            add_up: Sums a tensor over the processes.

        Yields:
            L weights and their sums (L, O).

        Raises:
            RuntimeError: If no forward pass was counted.
        """
        if not self._passes:
            raise RuntimeError(
                "No forward pass of the step was recorded: hooks are not called in code that was compiled without them. "
                "Train without torch_compile."
            )
        sums = add_up(self._counted)
        start = 0
        for size, modules in self._alike:
            rows_LO = sums[start : start + size * len(modules)].view(len(modules), size)
            start += size * len(modules)
            members = [(w, row) for row, m in enumerate(modules) for w in self._by_module[m]]
            yield [w for w, _ in members], rows_LO[[row for _, row in members]]

    def clear(self) -> None:
        """Start a new step."""
        self._counted.zero_()
        self._passes = 0

    def remove(self) -> None:
        """Remove the hooks from the model."""
        while self._handles:
            self._handles.pop().remove()
