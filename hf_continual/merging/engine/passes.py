"""Passes that only look: values of several models side by side, chunk by chunk, nothing written."""

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
    """Makes passes for a method, and keeps what they found.

    Args:
        kept: What an interrupted merge of the same inputs found before, and what is found now; plain data.
        keep: Called when something was found.
        folder: Where a method may keep files of its own, which are gone when the output is published.
    """

    def __init__(
        self, kept: dict[str, Any] | None = None, keep: Callable[[], None] = lambda: None, folder: Path = Path()
    ) -> None:
        self.kept, self.folder = {} if kept is None else kept, folder
        self._keep = keep

    def once(self, key: str, find: Callable[[], Any]) -> Any:
        """What is found under a key, looked for only where it is not known yet; plain data."""
        if key not in self.kept:
            self.kept[key] = find()
            self._keep()
        return self.kept[key]

    def tensors(self, members: Sequence[Member], look: Rule) -> list[OutputTensor]:
        """The tensors of which not all models hold the very same stored values.

        Args:
            members: The models.
            look: What is done with a range; its result is what `over` gives.

        Returns:
            The tensors, in order.
        """
        found = model_tensors(members, lambda _: look, None, "strict", [])
        return [t for t in found if t.parts[0].function is not None]

    def over(self, tensors: Sequence[OutputTensor]) -> Iterator[tuple[Chunk, Tensor]]:
        """One pass over tensors: each range, and what `look` made of it.

        Args:
            tensors: From `tensors`.

        Yields:
            tuple: The range, and the result, valid until the next.
        """
        for _, part, chunk in chunks(tensors):
            assert part.function is not None
            yield chunk, part.function(chunk)

    def sums(self, members: Sequence[Member], of: Callable[[Sequence[Tensor]], Tensor]) -> dict[str, Tensor]:
        """Sums over the ranges of each tensor of which not all models hold the very same stored values, in one pass.

        Args:
            members: The models.
            of: A small tensor of the values of a range, such as their products; it must not change them.

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
