"""Where the importance of single weights is stored, and under which names: `KIF` states, or files of scores.

``checkpoint-N/continual/kif.safetensors`` holds ``inner.importance/NAME`` and ``inner.uncertainty/NAME`` of the new
task, ``outer. ...`` of the old ones, by the names of parameters in memory. A file of scores holds NAME -> score, or
``importance/NAME`` and ``uncertainty/NAME``. Only headers are read here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_continual.merging.errors import MergeError, some
from hf_continual.merging.inputs.checkpoint import Checkpoint
from hf_continual.merging.inputs.safetensors_file import StoredFile, StoredTensor, read_header

Side = Literal["new", "old"]
SIDES: tuple[Side, Side] = ("new", "old")
_LEARNER = {"new": "inner", "old": "outer"}
_STATE = "kif.safetensors"
_IMPORTANCE, _UNCERTAINTY = "importance/", "uncertainty/"
# PEFT appends the adapter's name to these in memory, and omits it in files.
_IN_MEMORY = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save)\.(?!weight$|bias$)[^.]+"
)


def stored_name(parameter: str) -> str:
    """The name under which a parameter is saved, such as ``...lora_A.weight`` for ``...lora_A.default.weight``."""
    name = parameter.replace("_orig_mod.", "")
    name = _IN_MEMORY.sub(lambda m: "" if m[1] == "modules_to_save" else f".{m[1]}", name)
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


@dataclass(frozen=True)
class Scores:
    """The scores of one side.

    Args:
        tensors: Name of a weight -> its score, or its importance and uncertainty, as stored.
        averages: Whether the first is an importance, to be multiplied by the uncertainty, or already a score.
        facts: Their entries in a report.
    """

    tensors: Mapping[str, tuple[StoredTensor, ...]]
    averages: bool
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Stored tensors per weight."""
        return len(next(iter(self.tensors.values())))


def given_sources(
    importance: Any, calibration_new: Any, calibration_old: Any
) -> tuple[dict[str, str | os.PathLike[str]], dict[str, Any]]:
    """Where the importance of each side comes from; rows take precedence over a file.

    Args:
        importance: A file or checkpoint for both sides, a mapping with ``"new"`` and ``"old"``, or a pair.
        calibration_new: Rows, or None.
        calibration_old: Rows, or None.

    Returns:
        Files by side, and rows by side.

    Raises:
        ValueError: If a side has neither.
    """
    if importance is None:
        files = {}
    elif isinstance(importance, str | os.PathLike):
        files = {"new": importance, "old": importance}
    elif isinstance(importance, Mapping):
        files = dict(importance)
        if unknown := [k for k in files if k not in ("new", "old")]:
            raise ValueError(f"importance has the key {unknown[0]!r}; it can only have 'new' and 'old'.")
    else:
        files = dict(zip(("new", "old"), importance, strict=False))
        if len(list(importance)) != 2:
            raise ValueError(
                f"importance={importance!r} is not a pair: give (of new, of old), or one checkpoint for both."
            )
    rows = {k: v for k, v in (("new", calibration_new), ("old", calibration_old)) if v is not None}
    if files and not (files := {k: v for k, v in files.items() if k not in rows and v is not None}):
        raise ValueError("importance= is not used: both sides have rows to calibrate on. Leave one of the three out.")
    if without := [s for s in ("new", "old") if s not in files and s not in rows]:
        raise ValueError(
            f"nothing says which elements matter to the {' and the '.join(without)} side: give "
            f"{', '.join(f'calibration_{s}=ROWS' for s in without)}, or importance=, a checkpoint of a run with KIF or "
            f"safetensors files of scores."
        )
    return files, rows


def read_scores(source: str | os.PathLike[str], side: Side, uncertainty: bool | None = None) -> Scores:
    """Find the scores of a side.

    Args:
        source: A checkpoint of a run with `KIF`, its state file, or a file of scores.
        side: ``"new"`` or ``"old"``.
        uncertainty: Multiply importance by its uncertainty; None: if the scores have one.

    Returns:
        The scores.

    Raises:
        FileNotFoundError: If there is no such file.
        MergeError: If the file holds nothing of this side, or no uncertainty if that is requested.
    """
    file = _find(Path(source))
    header = read_header(file)
    of_state = f"{_LEARNER[side]}."
    is_state = any(n.startswith(tuple(f"{learner}.{_IMPORTANCE}" for learner in _LEARNER.values())) for n in header)
    prefix = of_state if is_state else ""
    first = _named(header, prefix + _IMPORTANCE)
    if is_state and not first:
        raise MergeError(
            f"{_short(file)} holds no importance of the {side} side ({of_state}{_IMPORTANCE}...): right after a fusion the "
            f"inner averages start over. Give a checkpoint from the middle of a round (save_steps that is not a multiple of "
            f"inner_steps), or calibration_{side}=ROWS."
        )
    averages = bool(first)
    first = first or _named(header, "")
    second = _named(header, prefix + _UNCERTAINTY) if averages else {}
    if not first:
        raise MergeError(f"{_short(file)} holds no tensors, so it has no scores of the {side} side.")
    if uncertainty and second.keys() != first.keys():
        raise MergeError(
            f"uncertainty=True, but {_short(file)} holds none for {some(first.keys() - second.keys())}. Give "
            f"uncertainty=False to use the importance alone."
        )
    both = second.keys() == first.keys() and uncertainty is not False
    tensors = {n: (t, second[n]) if both else (t,) for n, t in first.items()}
    whole = Checkpoint(file.name, file.parent, {}, header, files=(next(iter(header.values())).file,))
    facts = {
        "from": "state" if is_state else "scores", "file": _short(file), "fingerprint": whole.fingerprint,
        "score": "importance x uncertainty" if both else "importance" if averages else "as stored",
    }  # fmt: skip
    return Scores(tensors, averages, facts)


def expected_scores(shapes: Mapping[str, tuple[int, ...]], number: int) -> Scores:
    """Placeholder for the scores that a calibration will write, for a plan that is made before it runs."""
    nowhere = StoredFile(Path(), 0, 0, "")
    made = {n: tuple(StoredTensor(n, nowhere, "F32", shape, 0) for _ in range(number)) for n, shape in shapes.items()}
    return Scores(made, True, {"from": "calibration"})


def check_scores(
    found: Scores, side: Side, shapes: Mapping[str, tuple[int, ...]], changed: Sequence[str], who: str
) -> None:
    """Compare scores with the weights they belong to.

    Args:
        found: The scores.
        side: Their side.
        shapes: Shapes of all weights.
        changed: Weights that are not the same in all models, which need scores.
        who: Name of the model, for messages.

    Raises:
        MergeError: With the first names that are missing, unknown or of another shape.
    """
    if missing := set(changed) - found.tensors.keys():
        raise MergeError(
            f"importance of the {side} side is missing for {len(missing)} of {len(changed)} tensors that changed "
            f"({some(missing)}); it covers {len(found.tensors)} ({some(list(found.tensors), 2)}). Give the state of "
            f"the run that trained {who}, or calibration_{side}=ROWS."
        )
    if unknown := found.tensors.keys() - shapes.keys():
        raise MergeError(
            f"importance of the {side} side names {len(unknown)} tensors that {who} does not have ({some(unknown)}). It "
            f"belongs to another model."
        )
    wrong = {n: t.shape for n, both in found.tensors.items() for t in both if t.shape != shapes[n]}
    if wrong:
        told = [f"{n} {list(wrong[n])} for a weight {list(shapes[n])}" for n in wrong]
        raise MergeError(
            f"importance of the {side} side has other shapes than {who}: {some(told)}. It belongs to another model."
        )


def _find(path: Path) -> Path:
    candidates = [path / "continual" / _STATE, path / _STATE] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{path} holds no importance: looked for {', '.join(str(c) for c in candidates)}. Give a checkpoint of a run with "
        f"KIF (checkpoint-N), or a safetensors file of scores."
    )


def _named(header: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for key, tensor in header.items():
        if key.startswith(prefix) and tensor.is_float:
            name = stored_name(key.removeprefix(prefix))
            if name in found:
                raise MergeError(
                    f"{_short(tensor.file.path)} holds {name!r} for two adapters. Keep only the one to be fused."
                )
            found[name] = tensor
    return found


def _short(file: Path) -> str:
    """The end of a path: enough to recognise a checkpoint, without its location."""
    parts = file.parts
    return "/".join(parts[-3:] if len(parts) > 2 and parts[-2] == "continual" else parts[-1:])
