"""Progress of a long pass before the first step, so that a killed run resumes it instead of starting over."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_continual.atomic_files import checksum
from hf_continual.data.distributed import from_first
from hf_continual.data.rows import digest_of
from hf_continual.methods.run import Run
from hf_continual.tensors.identity import sample_of


class Unfinished:
    """The sums over the finished parts of a pass, in ``output_dir/continual-NAME.unfinished``, until the task ends.

    Args:
        run: The run; without an output folder, nothing is kept.
        name: The method's name.
        options: Other inputs of the result: a file with different options, rows or weights is ignored.
    """

    def __init__(self, run: Run, name: str, options: Mapping[str, Any]) -> None:
        self._run, self._options = run, dict(options)
        self._file = None if run.output_dir is None else run.output_dir / f"continual-{name}.unfinished"

    @cached_property
    def _key(self) -> str:
        run = self._run
        given = [self._options, run.seed, run.batch_size, run.learning_rate, run.max_length, run.optimizer_defaults()]
        return checksum([*map(repr, given), digest_of(run.task_rows), sample_of(run.named_parameters())])

    def read(self) -> tuple[int, dict[str, Tensor]]:
        """Number of finished parts, and their sums; 0 and nothing if there is no such file."""
        if self._file is None:
            return 0, {}
        key, file = self._key, self._file
        done = from_first(lambda: _done(file, key))
        return done, load_file(file) if done else {}

    def write(self, done: int, sums: Mapping[str, Tensor]) -> None:
        """Keep the sums over `done` parts; written whole or not at all."""
        if self._file is None or not self._run.is_main_process:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f".{self._file.name}.partial")
        save_file(dict(sums), partial, metadata={"key": self._key, "done": str(done)})
        os.replace(partial, self._file)

    def clear(self) -> None:
        """Remove the file: the pass is no longer needed."""
        if self._file is not None and self._run.is_main_process:
            with contextlib.suppress(FileNotFoundError):
                self._file.unlink()


def _done(file: Path, key: str) -> int:
    if not file.is_file():
        return 0
    try:
        with safe_open(file, "pt") as opened:
            facts = opened.metadata() or {}
    except (SafetensorError, OSError):
        return 0  # truncated by a power cut: the pass starts over
    return int(facts["done"]) if facts.get("key") == key else 0
