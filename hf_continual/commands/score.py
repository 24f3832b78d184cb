"""`hf-continual score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def score(
    folder: Annotated[
        str, typer.Argument(help="Folder or Hub id of a model or adapter, or the folder of a plan's run.")
    ],
    test: Annotated[str, typer.Option(help="Rows to score it with: a file, a saved dataset, a Hub id.")],
    metric: Annotated[str, typer.Option(help="A name, or YAML: '{generated: {max_new_tokens: 32}}'.")] = "exact_match",
    base: Annotated[str | None, typer.Option(help="The adapter's base, if it was moved.")] = None,
    split: Annotated[str, typer.Option(help="Split of the rows, if there are several.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of rows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 32,
    predictions: Annotated[Path | None, typer.Option(help="File for the model's answer to each row.")] = None,
    dtype: Annotated[str, typer.Option(help="dtype of the weights: float32, bfloat16, float16 or auto.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, and only the value.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the score as JSON.")] = False,
) -> None:
    """Score a model, an adapter or the last model of a plan on rows."""
    from hf_continual.stream.score_folder import score_from_command

    score_from_command(
        folder, test, metric=metric, base=base, split=split, limit=limit, batch_size=batch_size, predictions=predictions,
        dtype=dtype, quiet=quiet, as_json=as_json,
    )  # fmt: skip
