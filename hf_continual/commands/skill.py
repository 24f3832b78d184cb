"""`hf-continual skill`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

SKILL = Path(__file__).parents[1] / "skill" / "SKILL.md"


def skill(
    path: Annotated[bool, typer.Option("--path", "--quiet", help="Print only where the file is.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print path and text as JSON.")] = False,
) -> None:
    """Print the skill file for coding agents: how to choose, run, resume, diagnose, gate, merge and publish."""
    text = SKILL.read_text(encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps({"path": str(SKILL), "text": text}, indent=1) + "\n")
    else:
        sys.stdout.write(f"{SKILL}\n" if path else text)
