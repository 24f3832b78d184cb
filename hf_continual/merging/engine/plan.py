"""What a merge will do, known before a value is read: bytes, memory, disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_continual.disk import CannotWrite, free_space, size
from hf_continual.merging.engine.layout import Layout
from hf_continual.merging.engine.shards import memory_bound


@dataclass(frozen=True)
class MergePlan:
    """A merge that passed every check.

    Args:
        layout: What will be written.
        files: Other files, name in the output -> source, or its text.
        facts: The report, as far as it is known.
        notes: Notes for the user.
    """

    layout: Layout
    files: Mapping[str, Path | str]
    facts: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Hash of everything that determines the output's bytes."""
        return self.facts["plan"]

    @property
    def asked(self) -> str:
        """Hash of the request: the models and the caller's options, not the results of passes over values."""
        return self.facts["asked"]

    @property
    def bytes_streamed(self) -> int:
        """Bytes of weights that are read in chunks, without the factors of adapters."""
        return sum(t.read_bytes for s in self.layout.shards for t in s.tensors)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that are read; for adapters, the bytes in their folders."""
        return self.bytes_streamed + sum(m["bytes"] for m in self.facts["models"] if m["kind"] == "adapter")

    @property
    def bytes_written(self) -> int:
        """Bytes of the weight files."""
        return sum(s.size for s in self.layout.shards)

    @property
    def memory(self) -> int:
        """Upper bound on the bytes of buffers, on top of what importing torch takes."""
        return memory_bound(self.layout.shards)


def check_disk(plan: MergePlan, output_dir: Path, there: int = 0) -> None:
    """Refuse a merge that the disk has no space for.

    Args:
        plan: The merge.
        output_dir: Where the result goes.
        there: Bytes of it already written.

    Raises:
        CannotWrite: ENOSPC, if the output and 2 % do not fit.
    """
    needed, free = int((plan.bytes_written - there) * 1.02), free_space(output_dir)
    if needed > free:
        raise CannotWrite(
            errno.ENOSPC,
            f"{output_dir} needs {size(needed)} ({needed:,} bytes) but only {size(free)} ({free:,} bytes) are free. Free some space, or choose an "
            f"output_dir on another disk",
        )


def show_plan(plan: MergePlan, output_dir: Path) -> None:
    """Print the plan of a dry run."""
    table = Table(title=f"{plan.facts['method']} -> {os.fspath(output_dir)}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for model in plan.facts["models"]:
        table.add_row(model["role"], f"{model['name']}  ({model['kind']}, {size(model['bytes'])})")
    tensors = [t for s in plan.layout.shards for t in s.tensors]
    copied = sum(1 for t in tensors if t.parts and all(p.function is None for p in t.parts))
    table.add_row(
        "output", f"{plan.layout.kind}" + ("" if plan.layout.rank is None else f" of rank {plan.layout.rank}")
    )
    table.add_row(
        "tensors", f"{len(tensors)}, {sum(prod(t.shape) for t in tensors):,} elements; {copied} copied unchanged"
    )
    for option, value in plan.facts["options"].items():
        table.add_row(option, str(value))
    table.add_row("read", size(plan.bytes_read))
    table.add_row(
        "write", f"{size(plan.bytes_written)} in {len(plan.layout.shards)} files and {len(plan.files) + 1} small ones"
    )
    lens = any(s.lens is not None for t in tensors for p in t.parts for s in p.sources)
    imports = "330 MB of imports, including transformers and bitsandbytes" if lens else "150 MB of imports"
    table.add_row("memory", f"at most {plan.memory / 2**20:.0f} MiB of buffers, on top of about {imports}")
    table.add_row("free disk", size(free_space(output_dir)))
    for note in plan.notes:
        table.add_row("note", note)
    table.add_row("checks", "all passed: names, shapes, dtypes, configurations, tokenizers, disk, output folder")
    Console().print(table)
