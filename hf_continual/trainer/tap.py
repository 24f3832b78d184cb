"""Read module outputs from the one forward pass in which the trainer computes its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.nn.functional import pad

from hf_continual.trainer.trl_trainer import FusedCausalLMOutput

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

LAST = "last_hidden_state"


class ForwardTap:
    """Hooks that are active only inside `record`, so nothing is held between steps; the first `record` adds them.

    The loss comes from a fused language-model head that returns neither logits nor hidden states, and
    a second forward for them would double the cost. Recomputation under gradient checkpointing
    happens in the backward pass, outside `record`, and is not recorded.

    Args:
        model: The unwrapped model; adapters are unwrapped.
        taps: ``"last_hidden_state"`` or paths of modules below the causal language model.
        compiled: Whether the forward pass is compiled.

    Raises:
        ValueError: If a path names no module.
    """

    def __init__(self, model: nn.Module, taps: tuple[str, ...], compiled: bool = False) -> None:
        self.taps, self.compiled = taps, compiled
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.outputs: FusedCausalLMOutput | None = None
        self.seen: dict[str, Tensor] = {}
        self.listening = False
        self.handles: list[RemovableHandle] = []
        self._hooks: list[tuple[nn.Module, Any]] = [(base, self._see_outputs)]
        modules: dict[str, Any] = dict(base.named_modules())
        for tap in taps:
            module: Any = base.base_model if tap == LAST else modules.get(tap)
            if module is None:
                near = ", ".join(list(modules)[1:8])
                raise ValueError(f"No module is called {tap!r} in {type(base).__name__}; there are {near}, ...")
            self._hooks.append((module, self._listener(tap)))

    def _see_outputs(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.listening and isinstance(output, FusedCausalLMOutput):
            self.outputs = output

    def _listener(self, tap: str) -> Any:
        def hear(module: nn.Module, args: Any, output: Any) -> None:
            if self.listening and tap not in self.seen:
                self.seen[tap] = output.last_hidden_state if tap == LAST else _first(output)

        return hear

    @contextlib.contextmanager
    def record(self) -> Iterator[ForwardTap]:
        """Record the forward pass inside the context; the outputs are dropped when it ends."""
        if not self.handles:
            if self.compiled:
                # Code that was compiled earlier in this process, for another run, does not call new hooks.
                torch.compiler.reset()
            self.handles = [module.register_forward_hook(hook) for module, hook in self._hooks]
        self.listening = True
        try:
            yield self
        finally:
            self.listening, self.outputs, self.seen = False, None, {}

    def heard(self) -> FusedCausalLMOutput:
        """The output of the forward pass; raises if a requested output was not recorded.

        Returns:
            Log-probabilities and the fused head's other outputs.

        Raises:
            RuntimeError: If a hook was not called.
        """
        missing = [tap for tap in self.taps if tap not in self.seen]
        if self.outputs is None or missing:
            raise RuntimeError(
                f"The forward pass ran without {', '.join(missing) or 'its output'} being recorded: hooks are not called "
                f"in code that was compiled without them. Train without torch_compile."
            )
        return self.outputs

    def remove(self) -> None:
        """Remove the hooks from the model."""
        while self.handles:
            self.handles.pop().remove()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def with_virtual_tokens(
    inputs: dict[str, Any], origin: dict[str, Any], width: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Widen inputs and maps to the model's outputs: the tokens that prompt learning prepends belong to no source.

    Args:
        inputs: The model's arguments.
        origin: The maps ``source``, ``row`` and ``offset`` of shape (B, S).
        width: Tokens of a row that the model saw, at least S.

    Returns:
        Both, of shape (B, width); unchanged if there are no virtual tokens.
    """
    virtual = width - inputs["input_ids"].shape[1]
    if virtual <= 0:
        return inputs, origin
    fills = {"labels": -100, "attention_mask": 1, "source": -100, "row": -1, "offset": -1}

    def wider(tensors: dict[str, Any]) -> dict[str, Any]:
        shape = inputs["input_ids"].shape
        return {
            k: pad(t, (virtual, 0), value=fills.get(k, 0)) if isinstance(t, torch.Tensor) and t.shape == shape else t
            for k, t in tensors.items()
        }

    return wider(inputs), wider(origin)
