"""The methods' state in a checkpoint, next to the trainer's own files.

``checkpoint-N/continual/run.json`` holds the methods as data and the replay counters,
``continual/NAME.json`` and ``continual/NAME.safetensors`` the state that method NAME returned.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_continual.atomic_files import read_json, write_json
from hf_continual.data.distributed import from_first
from hf_continual.trainer.whole import FOLDER, MARKER, damage_of

logger = logging.getLogger(__name__)


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
            write_json(folder / f"{name}.json", plain)
    write_json(folder / "run.json", run)


def read_run(checkpoint: Path) -> dict[str, Any] | None:
    """The run's facts of a checkpoint, or None if it was written without methods."""
    file = checkpoint / FOLDER / "run.json"
    return _read(file) if file.is_file() else None


def read_state(checkpoint: Path, name: str) -> dict[str, Any]:
    """The state of one method; empty if it kept none."""
    tensors, plain = (checkpoint / FOLDER / f"{name}.{suffix}" for suffix in ("safetensors", "json"))
    return {key: value for file in (tensors, plain) if file.is_file() for key, value in _read(file).items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        return load_file(file) if file.suffix == ".safetensors" else dict(read_json(file))
    except (SafetensorError, ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({error}). Resume from another checkpoint: resume_from_checkpoint=True uses the newest "
            f"complete one."
        ) from error


def check_same_methods(
    checkpoint: Path, now: Sequence[dict[str, Any]], places: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Compare a checkpoint's methods with the run's.

    Args:
        checkpoint: The checkpoint to resume.
        now: The run's methods as data, see `Methods.describe`.
        places: Hyper-parameters of each method that are locations; they may differ.

    Raises:
        ValueError: If the methods or their hyper-parameters differ, or the checkpoint lacks the state of one.
    """
    run = read_run(checkpoint)
    if run is None and now:
        raise ValueError(
            f"{checkpoint} was written without methods (it has no {FOLDER}/run.json), but this run has "
            f"{[next(iter(m)) for m in now]}. A resumed run must continue as it began. Resume without methods, or "
            f"{_new_run(checkpoint)}"
        )
    if lines := _differences(run["methods"] if run else [], list(now), places or {}):
        raise ValueError(
            f"{checkpoint} was written with different methods than this run's: {'; '.join(lines)}. A resumed "
            f"run must continue as it began. Give it the same methods, or {_new_run(checkpoint)}"
        )
    if run and run.get("not_saved"):
        raise ValueError(
            f"{checkpoint} was saved with save_only_model=True, so the state of {', '.join(run['not_saved'])} is not in it "
            f"and the run cannot continue as it began. Train with save_only_model=False to be able to resume, or "
            f"{_new_run(checkpoint)}"
        )


def _new_run(checkpoint: Path) -> str:
    """How to train further from a checkpoint's weights."""
    start = "start a new run from the checkpoint's weights: "
    if not (checkpoint / "adapter_config.json").is_file():
        return f"{start}ContinualTrainer(model={str(checkpoint)!r}, ...)."
    return (
        f"{start}load the base model and put the adapter on it, model = PeftModel.from_pretrained(base, "
        f"{str(checkpoint)!r}, is_trainable=True), then ContinualTrainer(model=model, ...) without peft_config."
    )


def _differences(
    then: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], places: Mapping[str, Sequence[str]]
) -> list[str]:
    then = [_by_kind(*pair) for pair in zip(then, now, strict=False)] + list(then[len(now) :])
    names_then, names_now = ([next(iter(m)) for m in side] for side in (then, now))
    if names_then != names_now:
        return [f"{names_then or 'none'} then, {names_now or 'none'} now"]
    lines = []
    for before, after in zip(then, now, strict=True):
        (name, old), (_, new) = *before.items(), *after.items()
        new = json.loads(json.dumps(new))
        lines += [
            f"{name}.{key} was {old.get(key)!r}, is {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if key not in places.get(name, ()) and old.get(key) != new.get(key)
        ]
    return lines


def _by_kind(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's method by its kind; older versions used the instance's name."""
    (key, options), (kind, given) = *then.items(), *now.items()
    old = key == options.get("name") == given.get("name")
    return {kind: options} if old else then


def check_same_rows(checkpoint: Path, digests: Mapping[str, str], names: Sequence[str] = ()) -> None:
    """Refuse to resume with different rows than the run began with, wherever they are stored.

    Args:
        checkpoint: The checkpoint to resume.
        digests: Digest of the rows of each method that has rows, see `digest_of`.
        names: Methods whose rows are all known by now, so that missing rows are a difference too.

    Raises:
        ValueError: If the rows of a method differ.
    """
    then = (read_run(checkpoint) or {}).get("rows")
    if then is None:
        return  # older versions did not record them
    for name in sorted((then.keys() & digests.keys()) | set(names)):
        if then.get(name) != digests.get(name):
            how = "different text, order or tokenizer" if name in then and name in digests else "one has none"
            raise ValueError(
                f"{name}: the rows are not those that {checkpoint} was trained with ({how}). A resumed run must continue as it "
                f"began. Give it the same rows, or {_new_run(checkpoint)}"
            )


def is_complete(checkpoint: Path) -> bool:
    """Whether a run can be resumed from a checkpoint; see `whole`."""
    return damage_of(checkpoint) is None


def last_complete_checkpoint(output_dir: str | Path, everywhere: bool = True) -> str | None:
    """The newest complete checkpoint, or None; logs which newer ones are skipped and why.

    A process killed while saving, a power cut or a damaged disk can leave a folder that cannot be resumed; the one
    before it can. All processes of a run get process 0's answer, unless `everywhere=False`.
    """
    return from_first(lambda: _last_complete(Path(output_dir))) if everywhere else _last_complete(Path(output_dir))


def _last_complete(folder: Path, passed_over: Path | None = None) -> str | None:
    steps = [(p.name.removeprefix("checkpoint-"), p) for p in folder.glob("checkpoint-*") if p.is_dir()]
    for _, checkpoint in sorted(((int(n), p) for n, p in steps if n.isdigit()), reverse=True):
        if checkpoint == passed_over:
            continue
        if (problem := damage_of(checkpoint)) is None:
            return str(checkpoint)
        logger.warning("%s is skipped: %s.", checkpoint, problem)
    return None


def check_whole(checkpoint: Path) -> None:
    """Refuse to resume from an incomplete checkpoint.

    Args:
        checkpoint: The requested checkpoint.

    Raises:
        ValueError: Naming the file, and the newest complete checkpoint in the same folder.
    """
    problem, other = from_first(lambda: _judged(checkpoint))
    if problem is None:
        return
    way = (
        f"The newest complete checkpoint in the same folder is {other}: resume_from_checkpoint={other!r}."
        if other
        else "No other checkpoint in the same folder is complete: train without resume_from_checkpoint, into an empty output_dir."
    )
    if (checkpoint / MARKER).is_file():
        way += f" If it was changed on purpose, remove {checkpoint / MARKER}: it is then checked by its files alone."
    raise ValueError(f"{checkpoint} cannot be resumed from: {problem}. {way}")


def _judged(checkpoint: Path) -> tuple[str | None, str | None]:
    problem = damage_of(checkpoint)
    return problem, None if problem is None else _last_complete(checkpoint.parent, passed_over=checkpoint)
