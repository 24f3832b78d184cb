"""`hf-continual diagnose`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def diagnose(
    before: Annotated[str, typer.Argument(help="Folder or Hub id of the model or adapter before the new training.")],
    after: Annotated[str, typer.Argument(help="The same after it.")],
    rows: Annotated[str, typer.Option(help="Rows of what was known before: a file, a saved dataset, a Hub id.")],
    base: Annotated[
        str | None, typer.Option(help="Full model that BEFORE was trained from; needed to find forgetting spurious.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the short training.")] = 30,
    learning_rate: Annotated[
        float | None, typer.Option(help="Its learning rate. By default 2e-5, for adapters 2e-4.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step and per forward pass.")] = 16,
    metric: Annotated[str, typer.Option(help="A name, or YAML: '{generated: {max_new_tokens: 32}}'.")] = "exact_match",
    group: Annotated[str | None, typer.Option(help="Column of rows that belong together and stay in one half.")] = None,
    limit: Annotated[int, typer.Option(min=16, help="Maximum number of rows.")] = 2000,
    margin: Annotated[float, typer.Option(min=0, help="Difference of scores that counts.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the halves and of the order.")] = 0,
    out: Annotated[Path, typer.Option(help="File for everything that was found.")] = Path("diagnosis.json"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the verdict only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as JSON.")] = False,
) -> None:
    """Find out whether what a model forgot is gone, or hidden and easy to bring back.

    Example: hf-continual diagnose out/task-00-old out/task-01-new --rows old.jsonl --base Qwen/Qwen2.5-0.5B
    """
    import yaml

    from hf_continual.paths import check_is_there, check_rows_there
    from hf_continual.stream.folder_model import model_of
    from hf_continual.stream.plan_lines import PlanError, PlanLoader

    check_rows_there(rows, "--rows")
    if base is not None:
        check_is_there(base, "--base")
    try:
        wanted = yaml.load(metric, PlanLoader)
    except yaml.YAMLError as error:
        raise PlanError(f"--metric {metric}: not valid YAML: {getattr(error, 'problem', error)}.") from None
    models = [model_of(folder).path for folder in (before, after)]
    from hf_continual.stream.command import set_up

    console = set_up(quiet=quiet, as_json=as_json)
    from hf_continual.diagnosis import diagnose as examine
    from hf_continual.diagnosis.report import diagnosis_report, headline

    found = examine(
        models[0], models[1], rows, base, steps=steps, learning_rate=learning_rate, batch_size=batch_size, metric=wanted,
        group=group, limit=limit, margin=margin, seed=seed,
    )  # fmt: skip
    found.write(out)
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=1) + "\n")
        return
    console.print(headline(found) if quiet else diagnosis_report(found), highlight=False, soft_wrap=quiet)
    if not quiet:
        console.print(f"everything  {out}", highlight=False, soft_wrap=True)
