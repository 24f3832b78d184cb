r"""Freezing the bottom layers, against spurious forgetting.

Zheng et al., "Spurious Forgetting in Continual Learning of Language Models", ICLR 2025,
https://arxiv.org/abs/2501.13453.

Much of what looks forgotten after a new task is still there; it lost its alignment with the
task, and that happens in the first steps and in the bottom layers. So when learning task t >= t0, the
input embeddings and the lowest n blocks are frozen:

    theta_F = {embeddings} + {parameters of blocks 0 .. n-1},     theta_F <- constant for t >= t0.

The embeddings are everything that runs between the token ids and block 0: token and position embeddings, and whatever
normalises, projects or adds to them. Vision and audio towers are trained as without the method.

Differs from the authors' code, which matches substrings of names: their `layers.1` also freezes layers
10 to 19, so most shipped configurations freeze more than the bottom. `compatibility="official-substring"`
does the same for comparisons. Theirs zeroes gradients or learning rates and still computes, stores and
decays everything; here no backward pass runs below the lowest weight that is trained.
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

from hf_continual.bounds import one_of, whole_number
from hf_continual.data.distributed import from_first
from hf_continual.methods.base import Method, Run
from hf_continual.paper import Paper
from hf_continual.tasks import Task
from hf_continual.tensors.adapters import (
    adapters_below,
    has_fresh_copy,
    is_fresh,
    remove_adapters,
    trainable_rows,
)
from hf_continual.tensors.layers import (
    Blocks,
    embedding_modules,
    find_blocks,
    input_embeddings,
    is_tied,
    modules_below,
    towers,
    untie,
)
from hf_continual.tensors.whole import elements, trainable_share

logger = logging.getLogger(__name__)


def frozen_modules(model: nn.Module, bottom: int, embeddings: bool) -> dict[str, nn.Module]:
    """The modules to freeze, by name.

    Args:
        model: A causal language model without adapters around it.
        bottom: Number of blocks, counted from the input.
        embeddings: Whether the input embeddings are among them.

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
    # One process may hold the weights and another none: the result must not depend on the process.
    below = from_first(lambda: list(modules_below(model))) if embeddings else []
    return {name: model.get_submodule(name) for name in below} | chosen


def official_substrings(blocks: Blocks, embedding_names: list[str], bottom: int) -> list[str]:
    """The substrings in the authors' configurations for n layers; a parameter whose name contains one is frozen."""
    last = blocks.path.rpartition(".")[2]
    return [*(name.rpartition(".")[2] for name in embedding_names), *(f"{last}.{i}" for i in range(bottom))]


@dataclass
class FreezeLayers(Method):
    """Freeze the input embeddings and the lowest blocks.

    Idea: early steps of a new task overwrite the bottom layers and misalign the layers above; frozen
    bottom layers keep old tasks readable, and the upper blocks have enough capacity to learn the new one.
    Hooks: model surgery. Cheaper than plain fine-tuning: no backward pass, gradients or optimizer
    state below the first trainable block, with gradient checkpointing too.
    Relations: composes with everything. With LoRA there are no adapters in frozen blocks; tokens that the adapter lists
    in `trainable_token_indices` stay trainable.

    Args:
        bottom: Number of blocks to freeze, counted from the input. The paper uses 1 to 3 of a 7B model
            after the first task, 6 to keep the alignment of a chat model, 7 or 8 of 12 for Biography.
        embeddings: Whether the input embeddings are frozen too. If the language-model head is the same
            matrix (tied), True freezes the head with it, and logs it; ``"untie"`` gives the head its own
            copy, which costs one more matrix; False leaves the matrix trainable.
        from_task: Index of the first task that is learned with frozen layers: 0 freezes at once, 1 learns
            the first task of a sequence with all weights.
        compatibility: ``"official-substring"`` freezes what the authors' code freezes, for comparisons.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If nothing would be frozen, nothing would be left to train, or an adapter's `modules_to_save`
            trains embeddings that should be frozen.
    """

    bottom: int
    embeddings: bool | Literal["untie"] = True
    from_task: int = 0
    compatibility: Literal["exact", "official-substring"] = "exact"
    _embeddings: list[nn.Module] = field(default_factory=list, init=False, repr=False, compare=False)
    _trained: list[nn.Module] = field(default_factory=list, init=False, repr=False, compare=False)
    _handles: list[RemovableHandle] = field(default_factory=list, init=False, repr=False, compare=False)
    _share: float = field(default=1.0, init=False, repr=False, compare=False)

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
            whole_number("FreezeLayers", what, value, least=0)
        one_of("FreezeLayers", "embeddings", self.embeddings, (True, False, "untie"))
        one_of("FreezeLayers", "compatibility", self.compatibility, ("exact", "official-substring"))
        if self.bottom == 0 and not self.embeddings:
            raise ValueError(
                "FreezeLayers(bottom=0, embeddings=False) freezes nothing. Give bottom=1 or more, or drop the method."
            )

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Freeze, before any wrapper and before the optimizer exists."""
        self._embeddings, self._trained = [], []
        if task.index < self.from_task:
            logger.info("freeze: task %d is learned with all weights (from_task=%d).", task.index, self.from_task)
            return
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if self.embeddings and is_tied(base):
            untie(base) if self.embeddings == "untie" else self._say_tied(base)
        modules = frozen_modules(base, self.bottom, bool(self.embeddings))
        self._check_copies(base, modules)
        frozen = self._parameters(base, modules)
        self._check_rest(model, base, frozen)
        if isinstance(model, PeftModel):
            self._free_of_adapters(model, modules)
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._report(model, base, frozen)
        self._trained = list(find_blocks(base).modules[self.bottom :])
        self._embeddings = [
            module
            for module in input_embeddings(base).values()
            if not any(p.requires_grad for p in module.parameters())
        ]

    def begin_task(self, run: Run) -> None:
        """Detach the outputs of frozen embeddings.

        Gradient checkpointing and adapters make them require a gradient, which would pull the backward pass through all
        frozen blocks. Anything else below that is trained (a projector, soft prompts) keeps its gradient.
        Re-entrant checkpointing needs an input that requires a gradient, so the first trainable block that runs gets
        one (on text alone, Mllama's cross attention does not run).
        """
        self.release()
        self._share = trainable_share(run.model)
        self._handles = [module.register_forward_hook(_detach_output) for module in self._embeddings]
        self._handles += [
            block.register_forward_pre_hook(_require_input_grad, with_kwargs=True) for block in self._trained
        ]

    def logged(self, run: Run) -> dict[str, torch.Tensor | float]:
        """The share of the model's parameters that is trained, counted once when the task begins."""
        return {"trainable": self._share}

    def release(self) -> None:
        """Remove the hooks from the model."""
        while self._handles:
            self._handles.pop().remove()

    def _parameters(self, base: nn.Module, modules: dict[str, nn.Module]) -> list[nn.Parameter]:
        """The parameters to freeze, each once: all of the modules' except rows of new tokens that an adapter trains."""
        rows = {id(p) for module in modules.values() for p in trainable_rows(module)}
        if rows:
            logger.info("freeze: the embedding rows listed in trainable_token_indices stay trainable.")
        found = {id(p): p for module in modules.values() for p in module.parameters()}
        if self.compatibility == "official-substring":
            parts = official_substrings(find_blocks(base), list(embedding_modules(base)), self.bottom)
            found = {id(p): p for name, p in base.named_parameters() if any(part in name for part in parts)}
        return [p for key, p in found.items() if key not in rows]

    def _check_copies(self, base: nn.Module, modules: dict[str, nn.Module]) -> None:
        blocks = find_blocks(base).path
        for name, module in modules.items():
            if not name.startswith(f"{blocks}.") and has_fresh_copy(module):
                raise ValueError(
                    f"FreezeLayers(embeddings={self.embeddings!r}) freezes {name}, but the adapter's modules_to_save "
                    f"trains it. Give FreezeLayers(embeddings=False), or take {name.rpartition('.')[2]!r} out of "
                    f"modules_to_save; trainable_token_indices trains only the rows of new tokens."
                )

    def _check_rest(self, model: nn.Module, base: nn.Module, frozen: list[nn.Parameter]) -> None:
        """Refuse to freeze everything trainable, before anything is changed."""
        gone = {id(p) for p in frozen}
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        if trained - gone:
            return
        blocks = find_blocks(base).modules
        lies = [i for i, block in enumerate(blocks) if any(id(p) in trained for p in block.parameters())]
        if not trained:
            advice = "No parameter was trainable before: set requires_grad, or add an adapter."
        elif lies and lies[-1] > 0:
            advice = f"The highest block with a trainable weight is {lies[-1]}: freeze {lies[-1]} or fewer blocks."
        elif lies:
            advice = (
                "All trainable parameters are in block 0: let the adapter reach higher blocks, or drop FreezeLayers."
            )
        else:
            advice = "All trainable parameters are embeddings: give embeddings=False, or drop FreezeLayers."
        raise ValueError(
            f"FreezeLayers(bottom={self.bottom}, embeddings={self.embeddings!r}) leaves no parameter of "
            f"{type(model).__name__} trainable. {advice}"
        )

    def _free_of_adapters(self, model: PeftModel, modules: dict[str, nn.Module]) -> None:
        layers = adapters_below(model, modules)
        fresh = {name: layer for name, layer in layers.items() if is_fresh(layer)}
        remove_adapters(model, fresh)
        logger.info(
            "freeze: %d new adapter layers below block %d were removed, %d others are kept and frozen.",
            len(fresh), self.bottom, len(layers) - len(fresh),
        )  # fmt: skip

    def _say_tied(self, base: nn.Module) -> None:
        size = elements(base.get_input_embeddings().weight)  # pyrefly: ignore[not-callable]
        logger.warning(
            "freeze: %s ties the language-model head to the input embeddings, so freezing these %d parameters freezes "
            "the head too. embeddings='untie' trains a separate head, embeddings=False trains the shared matrix.",
            type(base).__name__, size,
        )  # fmt: skip

    def _report(self, model: nn.Module, base: nn.Module, frozen: list[nn.Parameter]) -> None:
        gone = {id(p) for p in frozen}
        total = sum(elements(p) for p in model.parameters())
        count = sum(elements(p) for p in model.parameters() if id(p) in gone)
        beside = {name: [p for p in params if p.requires_grad] for name, params in towers(base).items()}
        other = sum(elements(p) for params in beside.values() for p in params)
        left = sum(elements(p) for p in model.parameters() if p.requires_grad) - other
        logger.info(
            "freeze: %d of %d parameters (%.1f %%) are frozen by it, %d are trained.",
            count, total, 100 * count / total, left,
        )  # fmt: skip
        if other:
            logger.info(
                "freeze: %d more parameters (%s) are trained only by rows that reach them, such as images.",
                other, ", ".join(name for name, params in beside.items() if params),
            )  # fmt: skip


def _detach_output(module: nn.Module, args: Any, output: Any) -> Any:
    return output.detach() if isinstance(output, torch.Tensor) else None


def _require_input_grad(module: nn.Module, args: Any, kwargs: Any) -> Any:
    def require(hidden_BSD: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or hidden_BSD.requires_grad:
            return hidden_BSD
        return hidden_BSD.detach().requires_grad_()

    checkpoint = module.__dict__.get("_gradient_checkpointing_func")
    if isinstance(checkpoint, partial) and checkpoint.keywords.get("use_reentrant"):
        return _on_hidden(args, kwargs, require)
    return None  # other blocks need no gradient of the input, and should not compute it


def _on_hidden(args: Any, kwargs: Any, change: Any) -> Any:
    """Apply a function to a block's hidden states, which come first or by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
