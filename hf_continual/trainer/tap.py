"""One forward pass, read in passing: module outputs seen while the trainer computes its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from trl.trainer.utils import FusedCausalLMOutput

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

LAST = "last_hidden_state"


class ForwardTap:
    """Hooks that listen only inside `record`, so nothing is held between steps; they are put on the model by the first.

    The loss comes from a fused language-model head that returns neither logits nor hidden states, and
    a second forward for them would double the cost. Recomputation under gradient checkpointing
    happens in the backward pass, outside `record`, and is not seen.

    Args:
        model: The unwrapped model; adapters are looked through.
        taps: ``"last_hidden_state"`` or paths of modules below the causal language model.

    Raises:
        ValueError: If a path names no module.
    """

    def __init__(self, model: nn.Module, taps: tuple[str, ...]) -> None:
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
        """Listen to the forward pass inside; what was heard is dropped when the context ends."""
        if not self.handles:
            self.handles = [module.register_forward_hook(hook) for module, hook in self._hooks]
        self.listening = True
        try:
            yield self
        finally:
            self.listening, self.outputs, self.seen = False, None, {}

    def remove(self) -> None:
        """Take the hooks off the model."""
        while self.handles:
            self.handles.pop().remove()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
