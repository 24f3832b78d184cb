"""`hf-continual train`: train a model on one set of rows, or show what that would cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.stream.command import estimated, is_main, kept_for_json, set_up, show_dry_run
from hf_continual.stream.single import read_single, said_of_score


def train_from_command(
    config: Path | None, given: Mapping[str, Any], overrides: Sequence[str], *, dry_run: bool = False, quiet: bool = False,
    as_json: bool = False, hourly_price: float | None = None,
) -> None:  # fmt: skip
    """Train on one set of rows, or show what it would do.

    Args:
        config: A file with fields of ContinualConfig, or None.
        given: Options of the command by name.
        overrides: Entries that override the file's, as ``KEY=VALUE``.
        dry_run: Whether to stop before any weights are loaded.
        quiet: Whether only warnings are logged.
        as_json: Whether to print the result as JSON.
        hourly_price: Price of an hour of this machine.
    """
    plan, where = read_single(config, given, overrides)
    console = set_up(quiet, as_json)
    if quiet:
        plan = plan.model_copy(update={"sft": {"disable_tqdm": True, "logging_strategy": "no", **plan.sft}})
    from hf_continual.stream.prepare import prepare

    if dry_run:
        described = estimated([("", prepare(plan, where))], hourly_price)
        if is_main():
            show_dry_run(described, console, as_json)
        return
    from hf_continual.stream.train_single import train_single

    with kept_for_json(as_json):
        result = train_single(prepare(plan, where), Path(plan.output_dir))
    if not is_main():
        return
    if as_json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return
    for name, cell in (("before", result["before"]), ("after", result["after"])):
        if cell is not None:
            console.print(f"{name:<7}{said_of_score(cell)}", highlight=False, soft_wrap=True)
    console.print(
        f"{result['kind']} in {result['output_dir']}, {result['steps']} steps", highlight=False, soft_wrap=True
    )
