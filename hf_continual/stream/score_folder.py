"""`hf-continual score`: a saved model on rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from hf_continual.paths import check_rows_there
from hf_continual.stream.folder_model import model_of
from hf_continual.stream.plan_lines import PlanError, PlanLoader


def score_from_command(
    folder: str, test: str, *, metric: str, base: str | None, split: str, limit: int | None, batch_size: int,
    predictions: Path | None, dtype: str, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Score a model and print the score.

    Args:
        folder: Folder or Hub id of a model or adapter, or the folder of a plan's run.
        test: The rows.
        metric: A name, or YAML.
        base: The adapter's base, instead of the recorded one.
        split: Split of the rows.
        limit: Maximum number of rows.
        batch_size: Rows per forward pass.
        predictions: File for the predictions, or None.
        dtype: dtype of the weights.
        quiet: Whether to print the value alone, without progress.
        as_json: Whether to print JSON.
    """
    model = model_of(folder, base, dtype)
    check_rows_there(test, "--test")
    try:
        wanted = yaml.load(metric, PlanLoader)
    except yaml.YAMLError as error:
        raise PlanError(f"--metric {metric}: not valid YAML: {getattr(error, 'problem', error)}.") from None
    from hf_continual.stream.command import set_up
    from hf_continual.stream.single import said_of_score

    console = set_up(quiet=True, as_json=as_json, bars=not quiet)
    from hf_continual.stream.score_model import score_model

    result = score_model(model, test, wanted, split, limit, batch_size, predictions)
    if as_json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return
    if quiet:
        sys.stdout.write(f"{result['value']:.6g}\n")
        return
    console.print(f"{said_of_score(result)}  {result['model']} on {test}", highlight=False, soft_wrap=True)
    if predictions is not None:
        console.print(f"predictions  {predictions}", highlight=False, soft_wrap=True)
