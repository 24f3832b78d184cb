"""`hf-continual recommend`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def recommend(
    plan: Annotated[Path, typer.Argument(help="The plan, a YAML file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override an entry of the plan, KEY=VALUE, as in run.")
    ] = None,
    old: Annotated[str | None, typer.Option(help="File of old rows that the plan does not name.")] = None,
    general: Annotated[str | None, typer.Option(help="File of general text that the plan does not name.")] = None,
    choose: Annotated[
        int | None, typer.Option(min=1, help="Print the whole plan with this recommendation, by its number.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the names, one per line.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print facts and recommendations, with whole plans, as JSON.")
    ] = False,
) -> None:
    """Recommend methods for a plan, by what it has, with the reason and the measured row that each rests on."""
    from hf_continual.stream.overrides import override
    from hf_continual.stream.plan_lines import read_yaml
    from hf_continual.stream.read_plan import read_plan
    from hf_continual.stream.recommend import as_yaml, described, facts_of, recommended

    read, _ = read_plan(plan, set_ or ())
    data, where = read_yaml(plan)
    data = override(data, set_ or (), where)
    facts, files = facts_of(read, old, general)
    found = [described(rule, data, files) for rule in recommended(facts)]
    if choose is not None:
        if choose > len(found):
            raise ValueError(
                f"choose={choose}: there are {len(found)} recommendations for this plan. Give 1 to {len(found)}."
            )
        sys.stdout.write(as_yaml(found[choose - 1]["plan"]))
    elif as_json:
        sys.stdout.write(json.dumps({"facts": facts, "recommendations": found}, indent=1) + "\n")
    elif quiet:
        sys.stdout.write("".join(f"{entry['name']}\n" for entry in found))
    else:
        _show(plan, facts, found)


def _show(plan: Path, facts: dict[str, str], found: list[dict]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"{plan}: " + "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()))
    for number, entry in enumerate(found, start=1):
        measured = entry["measured"]
        console.print(f"\n{number}. {entry['name']}: {entry['title']}", style="bold")
        console.print(f"   {entry['why']}" + (f" {entry['note']}" if entry["note"] else ""))
        console.print(f"   Not if: {entry['avoid']}")
        console.print(f"   Measured ({measured['setting']}), {measured['file']}:")
        console.print(f"     {measured['head']}\n     {measured['row']}\n")
        console.print("".join(f"     {row}\n" for row in entry["snippet"].splitlines()), end="")
    console.print(
        f"\nThe whole plan with one of them: hf-continual recommend {plan} --choose 1 > new.yaml. All: recipes/choosing.md"
    )
