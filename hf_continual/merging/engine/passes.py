"""Read-only passes: values of several models side by side, chunk by chunk, nothing written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_continual.merging.engine.chunks import Chunk, OutputTensor, chunks
from hf_continual.merging.engine.model_output import model_tensors
from hf_continual.merging.engine.rules import Rule
from hf_continual.merging.inputs.members import Member


class Passes:
    """Runs passes for a method, and stores their results.

    Args:
        kept: Results of an interrupted merge of the same inputs, and new ones; plain data.
        keep: Called after each new result.
        folder: Where a method may keep its own files; they are deleted when the output is published.
    """

    def __init__(
        self, kept: dict[str, Any] | None = None, keep: Callable[[], None] = lambda: None, folder: Path = Path()
    ) -> None:
        self.kept, self.folder = {} if kept is None else kept, folder
        self._keep = keep

    def once(self, key: str, find: Callable[[], Any]) -> Any:
        """Return the result stored under a key; compute it only if there is none. Plain data."""
        if key not in self.kept:
            self.kept[key] = find()
            self._keep()
        return self.kept[key]

    def tensors(self, members: Sequence[Member], look: Rule) -> list[OutputTensor]:
        """The tensors whose stored values are not identical in all models.

        Args:
            members: The models.
            look: Function applied to a range; `over` yields its result.

        Returns:
            The tensors, in order.
        """
        found = model_tensors(members, lambda _: look, None, "strict", [])
        return [t for t in found if t.parts[0].function is not None]

    def over(self, tensors: Sequence[OutputTensor]) -> Iterator[tuple[Chunk, Tensor]]:
        """Make one pass over tensors: each range, and the result of `look`.

        Args:
            tensors: From `tensors`.

        Yields:
            tuple: The range, and the result, valid until the next.
        """
        for _, part, chunk in chunks(tensors):
            assert part.function is not None
            yield chunk, part.function(chunk)

    def sums(self, members: Sequence[Member], of: Callable[[Sequence[Tensor]], Tensor]) -> dict[str, Tensor]:
        """Sum over the ranges of each tensor whose stored values differ between models, in one pass.

        Args:
            members: The models.
            of: Computes a small tensor from the values of a range, such as their products; must not change them.

        Returns:
            The sums by name.
        """
        found: dict[str, Tensor] = {}

        def look(values: Sequence[Tensor], at: Chunk) -> Tensor:
            part = of(values)
            found[at.name] = found[at.name] + part if at.name in found else part
            return values[0]

        deque(self.over(self.tensors(members, look)), maxlen=0)
        return found

    def elements(self, tensors: Sequence[OutputTensor]) -> int:
        """Number of elements of tensors."""
        return sum(prod(t.shape) for t in tensors)
