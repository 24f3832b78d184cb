"""Merge by method name, from a command line or from a file. torch is imported only when a merge begins."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import typer
import yaml

from hf_continual.disk import size
from hf_continual.merging.config_file import read_merge_file
from hf_continual.merging.method_options import MethodOption, options_of
from hf_continual.merging.methods.table import MERGES, merge_class
from hf_continual.named import imported, nearest

METHODS = tuple(name.replace("_", "-") for name in MERGES)
NUMBERS = {1: "one model", 2: "two models"}


def read_set(pairs: list[str] | None) -> dict[str, Any]:
    """Parse the pairs of ``--set``; YAML numbers, lists and booleans are converted."""
    found = {}
    for pair in pairs or ():
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise ValueError(f"--set {pair!r}: write NAME=VALUE, such as density=0.1.")
        found[name.replace("-", "_")] = yaml.safe_load(value)
    return found


def run_file(
    file: Path, method: str | None, models: list[str] | None, out: Path | None, base: str | None, given: dict[str, Any],
    written: dict[str, Any], as_json: bool = False,
) -> None:  # fmt: skip
    """Run the merge that a file describes; options of the command line take precedence.

    Args:
        file: The file.
        method: Must not be given.
        models: Must not be given.
        out: Output folder in place of the file's.
        base: Base in place of the file's.
        given: Options of the method.
        written: Options of every merge.
        as_json: Whether to print what came out as JSON.

    Raises:
        ValueError: If the command names models too, or no output folder is named.
    """
    if method is not None or models:
        raise ValueError(
            f"--config {file} names the method and the models; {method} {' '.join(models or ())} were given as well."
        )
    found = read_merge_file(file)
    target = out or (Path(found.out) if found.out else None)
    if target is None:
        raise ValueError(f"{file} names no output folder. Give --out, or out: in the file.")
    known = set(importlib.import_module("hf_continual.merging.engine.options").OutputOptions.__annotations__)
    options = {**{k: v for k, v in found.options.items() if k not in known}, **given}
    # Options that the command leaves at their default come from the file.
    defaults = {"overwrite": False, "resume": True, "dry_run": False}
    said = {k: v for k, v in written.items() if v is not None and v != defaults.get(k)}
    how = {**written, **{k: v for k, v in found.options.items() if k in known}, **said}
    run_merge(found.method, list(found.models), target, base or found.base, options, how, as_json)


def run_merge(
    method: str, models: list[str], out: Path, base: str | None, given: dict[str, Any], written: dict[str, Any],
    as_json: bool = False,
) -> None:  # fmt: skip
    """Merge, and print a summary of the result.

    Args:
        method: Name of the method.
        models: The models.
        out: The output folder.
        base: The base, or None.
        given: Options of the method.
        written: Options of every merge.
        as_json: Whether to print what came out as JSON.

    Raises:
        ValueError: If there is no such method, or it does not take an option.
    """
    known = options_of(method)
    if strange := [k for k in given if k not in known]:
        refuse_option("--" + strange[0].replace("_", "-"), method, known)
    _check_given(method, known, models, base, given)
    if any(k.startswith("calibration") for k in given):
        _quiet_transformers()
    options = {**{k: known[k].read(v) for k, v in given.items()}, **{k: v for k, v in written.items() if v is not None}}
    result = imported("hf_continual.merging.merge:merge")(method, models, out, base=base, **options)
    if as_json:
        facts = {
            "output": str(result.output_dir),
            "kind": result.kind,
            "rank": result.rank,
            "seconds": dict(result.seconds),
        }
        typer.echo(json.dumps({**facts, "report": dict(result.report)}, indent=1, default=str))
    elif not written["dry_run"]:
        seconds = ", ".join(f"{k} {v:.1f} s" for k, v in result.seconds.items())
        form = result.kind if result.rank is None else f"{result.kind} of rank {result.rank}"
        typer.echo(f"{form} in {result.output_dir}  ({size(result.bytes_written)}; {seconds})")


def _quiet_transformers() -> None:
    import datasets
    from transformers.utils import logging as hf_logging

    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing.*` is deprecated", FutureWarning)
    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()


def refuse_option(
    option: str, method: str | None, known: Mapping[str, MethodOption], shared: Iterable[str] = ()
) -> NoReturn:
    """Raise an error that lists what a method takes.

    Args:
        option: The option that it does not take, as it was written.
        method: The method, or None.
        known: Its options.
        shared: Spellings of the options of every merge, for suggestions.

    Raises:
        ValueError: Always.
    """
    own = [option.spelling for option in known.values()]
    names = [name.removeprefix("--") for name in (*own, *shared) if name != "--help"]
    meant = nearest(option.removeprefix("--"), names)
    hint = "" if meant is None else f" Did you mean --{meant}?"
    if method is None:
        raise ValueError(f"{option} is not an option of every merge.{hint} Name the METHOD that has it.")
    takes = f"takes {', '.join(own) or 'no options of its own'}."
    raise ValueError(f"merge {method} does not take {option}" + (f".{hint} It {takes}" if hint else f"; it {takes}"))


def _check_given(
    method: str, known: Mapping[str, MethodOption], models: list[str], base: str | None, given: Mapping[str, Any]
) -> None:
    """Report everything that a method lacks in one error."""
    cls = merge_class(method)
    least, most = cls.models
    fits = least <= len(models) <= (most or len(models))
    required = [option.spelling for name, option in known.items() if option.required]
    lacking = any(option.required and name not in given for name, option in known.items())
    if fits and not lacking and not (cls.from_base and base is None):
        return
    count = f"{least} to {most} models" if most and most > least else NUMBERS.get(least, f"{least} models")
    needs = [] if fits else [f"{count} (got {len(models)})"]
    needs += ["--base"] if cls.from_base else []
    needs += required
    raise ValueError(
        f"merge {method} needs {', '.join(needs[:-1])}{' and ' if len(needs) > 1 else ''}{needs[-1]}."
        + (" The base is the model that the others were fine-tuned from." if cls.from_base and base is None else "")
    )
