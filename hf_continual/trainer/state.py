"""What the methods of a run know, beside the trainer's own files in a checkpoint.

``checkpoint-N/continual/run.json`` holds the methods as data and the replay counters,
``continual/NAME.json`` and ``continual/NAME.safetensors`` what method NAME returned as its state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint

FOLDER = "continual"


def write_state(checkpoint: Path, run: dict[str, Any], states: dict[str, dict[str, Any]]) -> None:
    """Write the run's facts and each method's state below a checkpoint folder.

    Args:
        checkpoint: The checkpoint's folder.
        run: Facts of the run, plain data.
        states: State by method name; values are tensors or plain data.
    """
    folder = checkpoint / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        tensors = {k: v.detach().cpu().contiguous() for k, v in state.items() if torch.is_tensor(v)}
        plain = {k: v for k, v in state.items() if not torch.is_tensor(v)}
        if tensors:
            save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        if plain:
            (folder / f"{name}.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")


def read_run(checkpoint: Path) -> dict[str, Any] | None:
    """The run's facts of a checkpoint, or None when it was written without methods."""
    file = checkpoint / FOLDER / "run.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def read_state(checkpoint: Path, name: str) -> dict[str, Any]:
    """The state of one method; empty when it kept none."""
    tensors, plain = (checkpoint / FOLDER / f"{name}.{suffix}" for suffix in ("safetensors", "json"))
    state: dict[str, Any] = dict(load_file(tensors)) if tensors.is_file() else {}
    return state | (json.loads(plain.read_text(encoding="utf-8")) if plain.is_file() else {})


def check_same_methods(checkpoint: Path, now: Sequence[dict[str, Any]]) -> None:
    """Compare a checkpoint's methods with the run's.

    Args:
        checkpoint: The checkpoint that is being resumed.
        now: The run's methods as data, see `Methods.describe`.

    Raises:
        ValueError: If the methods or their hyper-parameters differ. Where the rows lie may differ.
    """
    run = read_run(checkpoint)
    then = run["methods"] if run else []
    if lines := _differences(then, list(now)):
        raise ValueError(
            f"{checkpoint} was written with other methods than this run has: {'; '.join(lines)}. A resumed "
            f"run must go on as it began. Give it the same methods, or start a new run from the "
            f"checkpoint's weights: ContinualTrainer(model={str(checkpoint)!r}, ...)."
        )


def _differences(then: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    names_then, names_now = ([next(iter(m)) for m in side] for side in (then, now))
    if names_then != names_now:
        return [f"{names_then or 'none'} then, {names_now or 'none'} now"]
    lines = []
    for before, after in zip(then, now, strict=True):
        (name, old), (_, new) = *before.items(), *after.items()
        new = json.loads(json.dumps(new))
        lines += [
            f"{name}.{key} was {old.get(key)!r}, is {new.get(key)!r}"
            for key in old.keys() | new.keys()
            if key not in ("rows", "memory") and old.get(key) != new.get(key)
        ]
    return lines


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state is the last file it writes."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was written to its end, or None.

    A process killed while it saves leaves a folder that cannot be resumed; the one before it can.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    if (last := get_last_checkpoint(str(folder))) is None or is_complete(Path(last)):
        return last
    steps = sorted(
        (int(p.name.removeprefix("checkpoint-")), p)
        for p in folder.glob("checkpoint-*")
        if p.name.removeprefix("checkpoint-").isdigit() and is_complete(p)
    )
    return str(steps[-1][1]) if steps else None
