"""A merge from words: of a command line, or of a file. What needs torch is imported when a merge begins."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import typer
import yaml

from hf_continual.disk import size
from hf_continual.merging.config_file import read_merge_file
from hf_continual.merging.methods.table import MERGES, merge_class, option_types
from hf_continual.named import did_you_mean, imported

# The two that are no `MergeMethod`: name -> function, and which options beside those of every merge it takes. All others are
# those of the table, with the options that their fields are.
FUNCTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "recall": (
        "hf_continual.merging.with_recall:merge_with_recall",
        (
            "weights", "calibration", "calibration_mode", "include_base", "num_typical", "pool_size", "max_length", "bandwidth",
            "temperature", "reference", "nonblock", "anchor", "seed", "device", "calibration_dtype", "low_memory",
        ),
    ),
    "kif": (
        "hf_continual.merging.kif:kif_fuse",
        (
            "importance", "calibration_new", "calibration_old", "rule", "top_share", "scope", "temperature", "old_from",
            "base_model", "device", "uncertainty", "beta1", "beta2", "order", "batch_size", "max_length", "calibration_dtype",
        ),
    ),
}  # fmt: skip
METHODS = ("recall", "kif", *(name.replace("_", "-") for name in MERGES))


def read_set(pairs: list[str] | None) -> dict[str, Any]:
    """Options as they are after ``--set``; a value that is YAML's number, list or truth becomes that."""
    found = {}
    for pair in pairs or ():
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise ValueError(f"--set {pair!r}: write NAME=VALUE, such as density=0.1.")
        found[name.replace("-", "_")] = yaml.safe_load(value)
    return found


def run_file(
    file: Path, method: str | None, models: list[str] | None, out: Path | None, base: str | None, given: dict[str, Any],
    written: dict[str, Any],
) -> None:  # fmt: skip
    """Make the merge that a file asks for; what the command says as well goes before.

    Args:
        file: The file.
        method: Must not be given.
        models: Must not be given.
        out: Output folder in place of the file's.
        base: Base in place of the file's.
        given: Options of the method.
        written: Options of every merge.

    Raises:
        ValueError: If the command names models too, or no output folder is named.
    """
    if method is not None or models:
        raise ValueError(
            f"--config {file} names the method and the models; {method} {' '.join(models or ())} came beside it."
        )
    found = read_merge_file(file)
    target = out or (Path(found.out) if found.out else None)
    if target is None:
        raise ValueError(f"{file} names no output folder. Say --out, or out: in the file.")
    known = set(importlib.import_module("hf_continual.merging.options").OutputOptions.__annotations__)
    options = {**{k: v for k, v in found.options.items() if k not in known}, **given}
    # What the command leaves at its default is the file's to say.
    defaults = {"overwrite": False, "resume": True, "dry_run": False}
    said = {k: v for k, v in written.items() if v is not None and v != defaults.get(k)}
    how = {**written, **{k: v for k, v in found.options.items() if k in known}, **said}
    run_merge(found.method, list(found.models), target, base or found.base, options, how)


def run_merge(
    method: str, models: list[str], out: Path, base: str | None, given: dict[str, Any], written: dict[str, Any]
) -> None:
    """Call the method's function with what was given, and say what came out.

    Args:
        method: Its name.
        models: The models.
        out: The output folder.
        base: The base, or None.
        given: Options of the method.
        written: Options of every merge.

    Raises:
        ValueError: If there is no such method, or it does not take an option.
    """
    if method not in METHODS and ":" not in method and method.replace("_", "-") not in METHODS:
        raise ValueError(
            f"there is no merge {method!r}.{did_you_mean(method, METHODS)} There are {', '.join(METHODS)}."
        )
    own = method in FUNCTIONS
    known = FUNCTIONS[method][1] if own else tuple(option_types(method))
    if strange := [k for k in given if k not in known]:
        takes = ", ".join("--" + k.replace("_", "-") for k in known) or "none of its own"
        raise ValueError(f"merge {method} does not take --{strange[0].replace('_', '-')}; it takes {takes}.")
    if method == "recall" or any(k.startswith("calibration") for k in given):
        _quiet_transformers()
    options = {
        **{k: _value(method, k, v) for k, v in given.items()},
        **{k: v for k, v in written.items() if v is not None},
    }
    if method == "kif":
        if base is None or len(models) not in (1, 2):
            raise ValueError(
                f"merge kif needs [OLD] NEW (got {len(models)} models) and --base, which both started from."
            )
        old = models[0] if len(models) == 2 else None
        result = imported(FUNCTIONS[method][0])(base, models[-1], out, old=old, **options)
    elif own:
        result = imported(FUNCTIONS[method][0])(models, out, base=base, **options)
    else:
        if method == "interpolate" and (base is None or len(models) != 1 or "alpha" not in options):
            raise ValueError(f"merge interpolate needs one model (got {len(models)}), --base and --alpha.")
        if base is None and merge_class(method).from_base:
            raise ValueError(f"merge {method} needs --base, the model that the others were tuned from.")
        result = imported("hf_continual.merging.merge:merge")(method, models, out, base=base, **options)
    if not written["dry_run"]:
        seconds = ", ".join(f"{k} {v:.1f} s" for k, v in result.seconds.items())
        form = result.kind if result.rank is None else f"{result.kind} of rank {result.rank}"
        typer.echo(f"{form} in {result.output_dir}  ({size(result.bytes_written)}; {seconds})")


def _quiet_transformers() -> None:
    import datasets
    from transformers.utils import logging as hf_logging

    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing.*` is deprecated", FutureWarning)
    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()


def _value(method: str, key: str, value: Any) -> Any:
    if key == "calibration":
        from hf_continual.data.rows import load_rows

        return load_rows(str(value))
    if key == "weights":
        if method == "recall":
            text = str(value).lstrip()
            return json.loads(text) if text.startswith("{") else value
        return _numbers(key, value) if isinstance(value, str) else value
    if key == "anchor":
        return int(value) if re.fullmatch(r"-?\d+", value) else value
    if key == "scale" and isinstance(value, str):
        found = _numbers(key, value)
        return found[0] if len(found) == 1 else found
    if key == "importance" and "," in value:
        return tuple(value.split(","))
    if key == "bandwidth" and value not in ("anchor_spread", "dim"):
        return _numbers(key, value)[0]
    return value


def _numbers(key: str, text: str) -> list[float]:
    try:
        return [float(part) for part in str(text).split(",")]
    except ValueError:
        raise ValueError(f"--{key}={text!r}: give numbers separated by commas, such as 0.7,0.3.") from None
