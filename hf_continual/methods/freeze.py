r"""Freezing the bottom layers, against spurious forgetting.

Zheng et al., "Spurious Forgetting in Continual Learning of Language Models", ICLR 2025,
https://arxiv.org/abs/2501.13453.

Much of what looks forgotten after a new task is still there; what was lost is its alignment with the
task, and that happens in the first steps and in the bottom layers. So when learning task t >= t0, the
input embeddings and the lowest n blocks stay as they are:

    theta_F = {embeddings} + {parameters of blocks 0 .. n-1},     theta_F <- constant for t >= t0.

Differs from the authors' code, which matches substrings of names: their `layers.1` also freezes layers
10 to 19, so most shipped configurations freeze more than the bottom. `compatibility="official-substring"`
does the same for comparisons. Theirs zeroes gradients or learning rates and still computes, stores and
decays everything; here nothing is computed below the first trainable block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from peft import PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_continual.methods.base import Method, Run
from hf_continual.paper import Paper
from hf_continual.tasks import Task
from hf_continual.tensors.adapters import adapters_below, is_fresh, remove_adapters
from hf_continual.tensors.layers import Blocks, embedding_modules, find_blocks, is_tied

logger = logging.getLogger(__name__)


def frozen_modules(model: nn.Module, bottom: int, embeddings: bool) -> dict[str, nn.Module]:
    """The modules that are to stay as they are, by name.

    Args:
        model: A causal language model without adapters around it.
        bottom: Number of blocks, counted from the input.
        embeddings: Whether the input embeddings belong to them.

    Returns:
        Modules by name.

    Raises:
        ValueError: If the model has fewer blocks, or nothing is selected.
    """
    blocks = find_blocks(model)
    if bottom > len(blocks):
        raise ValueError(
            f"FreezeLayers(bottom={bottom}): {type(model).__name__} has {len(blocks)} blocks ({blocks.path}). "
            f"Give at most {len(blocks)}; the paper uses 1 to 3 after the first task."
        )
    chosen = {f"{blocks.path}.{i}": blocks.modules[i] for i in range(bottom)}
    return (embedding_modules(model) if embeddings else {}) | chosen


def official_substrings(blocks: Blocks, embedding_names: list[str], bottom: int) -> list[str]:
    """What the authors' configurations list for n layers; a parameter whose name contains one is frozen."""
    last = blocks.path.rpartition(".")[2]
    return [*(name.rpartition(".")[2] for name in embedding_names), *(f"{last}.{i}" for i in range(bottom))]


@dataclass
class FreezeLayers(Method):
    """Keep the input embeddings and the lowest blocks as they are.

    Idea: early steps of a new task overwrite the bottom layers and misalign what lies above; frozen
    bottom layers keep old tasks readable, and the upper blocks have room enough to learn the new one.
    Stations: model surgery. Cheaper than plain fine-tuning: no backward pass, gradients or optimizer
    state below the first trainable block, with gradient checkpointing too.
    Relations: composes with everything. With LoRA it means no adapters below.

    Args:
        bottom: Number of blocks to freeze, counted from the input. The paper uses 1 to 3 of a 7B model
            after the first task, 6 to keep the alignment of a chat model, 7 or 8 of 12 for Biography.
        embeddings: Whether the input embeddings are frozen too. Where the language-model head is the same
            matrix (tied), True freezes the head with it, and says so; ``"untie"`` gives the head a copy of its
            own, which costs one more matrix; False leaves the matrix trainable.
        from_task: Index of the first task that is learnt with frozen layers: 0 freezes at once, 1 learns
            the first task of a sequence with all weights.
        compatibility: ``"official-substring"`` freezes what the authors' code freezes, for comparisons.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If nothing would be frozen, or nothing would be left to train.
    """

    bottom: int
    embeddings: bool | Literal["untie"] = True
    from_task: int = 0
    compatibility: Literal["exact", "official-substring"] = "exact"
    _cut: tuple[nn.Module, nn.Module | None] | None = field(default=None, init=False, repr=False, compare=False)
    _handles: list[RemovableHandle] = field(default_factory=list, init=False, repr=False, compare=False)

    name: ClassVar[str] = "freeze"
    paper: ClassVar[Paper] = Paper(
        "Spurious Forgetting in Continual Learning of Language Models",
        "Zheng and Cai and Qiu and Ma",
        2025,
        arxiv="2501.13453",
        venue="ICLR 2025",
    )

    def __post_init__(self) -> None:
        for what, value in (("bottom", self.bottom), ("from_task", self.from_task)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"FreezeLayers({what}={value!r}) must be an int, got {type(value).__name__}.")
            if value < 0:
                raise ValueError(f"FreezeLayers({what}={value}) must be 0 or more.")
        if not isinstance(self.embeddings, bool) and self.embeddings != "untie":
            raise TypeError(f"FreezeLayers(embeddings={self.embeddings!r}) must be True, False or 'untie'.")
        if self.compatibility not in ("exact", "official-substring"):
            raise ValueError(
                f"FreezeLayers(compatibility={self.compatibility!r}) must be 'exact' or 'official-substring'."
            )
        if self.bottom == 0 and not self.embeddings:
            raise ValueError(
                "FreezeLayers(bottom=0, embeddings=False) freezes nothing. Give bottom=1 or more, or drop the method."
            )

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Freeze, before any wrapper and before the optimizer exists."""
        self._cut = None
        if task.index < self.from_task:
            logger.info("freeze: task %d is learnt with all weights (from_task=%d).", task.index, self.from_task)
            return
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if self.embeddings and is_tied(base):
            self._untie(base) if self.embeddings == "untie" else self._say_tied(base)
        modules = frozen_modules(base, self.bottom, bool(self.embeddings))
        if isinstance(model, PeftModel):
            self._free_of_adapters(model, modules)
        parameters = [p for module in modules.values() for p in module.parameters()]
        if self.compatibility == "official-substring":
            parts = official_substrings(find_blocks(base), list(embedding_modules(base)), self.bottom)
            parameters = [p for name, p in base.named_parameters() if any(part in name for part in parts)]
        for parameter in parameters:
            parameter.requires_grad_(False)
        self._report(model, parameters)
        blocks = find_blocks(base).modules
        # Trainable embeddings need the gradient that the cut would keep from them.
        below = [p for module in embedding_modules(base).values() for p in module.parameters()]
        if self.bottom and not any(p.requires_grad for p in below):
            self._cut = (blocks[0], blocks[self.bottom] if self.bottom < len(blocks) else None)

    def begin_task(self, run: Run) -> None:
        """Cut the graph below the first block.

        Gradient checkpointing and adapters make the embeddings' output require a gradient, which would draw the
        backward pass through all frozen blocks. Re-entrant checkpointing needs an input that requires one, so the
        first trainable block gets it.
        """
        if self._cut is not None:
            first, trainable = self._cut
            self._handles.append(first.register_forward_pre_hook(_detach_input, with_kwargs=True))
            if trainable is not None:
                self._handles.append(trainable.register_forward_pre_hook(_require_input_grad, with_kwargs=True))

    def end_task(self, run: Run) -> None:
        """Give the model back without hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _free_of_adapters(self, model: PeftModel, modules: dict[str, nn.Module]) -> None:
        layers = adapters_below(model, modules)
        fresh = {name: layer for name, layer in layers.items() if is_fresh(layer)}
        remove_adapters(model, fresh)
        logger.info(
            "freeze: %d new adapter layers below block %d were taken off, %d trained ones are kept and frozen.",
            len(fresh), self.bottom, len(layers) - len(fresh),
        )  # fmt: skip

    def _untie(self, base: nn.Module) -> None:
        head = base.get_output_embeddings()  # pyrefly: ignore[not-callable]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        base.config.tie_word_embeddings = False  # pyrefly: ignore

    def _say_tied(self, base: nn.Module) -> None:
        size = base.get_input_embeddings().weight.numel()  # pyrefly: ignore[not-callable]
        logger.warning(
            "freeze: %s ties the language-model head to the input embeddings, so freezing these %d parameters freezes "
            "the head too. embeddings='untie' trains a head of its own, embeddings=False trains the shared matrix.",
            type(base).__name__, size,
        )  # fmt: skip

    def _report(self, model: nn.Module, frozen: list[nn.Parameter]) -> None:
        total = sum(p.numel() for p in model.parameters())
        left = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if left == 0:
            raise ValueError(
                f"FreezeLayers(bottom={self.bottom}, embeddings={self.embeddings!r}) leaves no parameter of "
                f"{type(model).__name__} trainable. Freeze fewer blocks."
            )
        logger.info(
            "freeze: %d of %d parameters (%.1f %%) are frozen by it, %d are trained.",
            sum(p.numel() for p in frozen), total, 100 * sum(p.numel() for p in frozen) / total, left,
        )  # fmt: skip


def _detach_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return _on_hidden(args, kwargs, torch.Tensor.detach)


def _require_input_grad(module: nn.Module, args: Any, kwargs: Any) -> Any:
    def require(hidden_BSD: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or hidden_BSD.requires_grad:
            return hidden_BSD
        return hidden_BSD.detach().requires_grad_()

    checkpoint = module.__dict__.get("_gradient_checkpointing_func")
    if isinstance(checkpoint, partial) and checkpoint.keywords.get("use_reentrant"):
        return _on_hidden(args, kwargs, require)
    return None  # everything else needs no gradient of the input, and should not compute it


def _on_hidden(args: Any, kwargs: Any, change: Any) -> Any:
    """Apply a function to a block's hidden states, which come first or by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
