"""The page: one file with everything in it, which asks nothing of any server."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from hf_continual.report.run import Run, clean
from hf_continual.report.style import Picture
from hf_continual.report.tables import Table
from hf_continual.versions import VERSION

LONGEST_CONFIG = 60_000  # characters of one run's configuration


@dataclass
class Section:
    """A part of the page.

    Args:
        key: Its anchor.
        title: Heading.
        pending: Pictures, in order.
        pictures: The same with their SVG, once they are drawn.
        tables: Tables under them.
        folded: Tables that open on a click.
        missing: Why there is nothing, or not everything, each a sentence.
    """

    key: str
    title: str
    pending: list[Picture] = field(default_factory=list)
    pictures: list[tuple[Picture, Markup]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def render(title: str, runs: Sequence[Run], sections: Sequence[Section], missing: Sequence[str]) -> str:
    """The page's text.

    Every text is escaped by the template. A policy in the page's head forbids requests, and scripts other than its own.

    Args:
        title: Heading.
        runs: The runs.
        sections: What is shown of them, in order.
        missing: What is not there, each a sentence.

    Returns:
        HTML.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_continual.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, finalize=_fit,
    )  # fmt: skip
    script, style = _file("page.js"), _file("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return environment.get_template("page.html.jinja").render(
        title=title, runs=runs, sections=sections, missing=missing, version=VERSION, policy=policy,
        style=Markup(style), script=Markup(script), configurations=[(run, configuration(run)) for run in runs],
        diagnoses=[(run, source, diagnosis(data)) for run in runs for source, data in run.diagnoses],
    )  # fmt: skip


def _fit(value: Any) -> Any:
    """Characters that HTML does not allow are replaced, in whatever text is written."""
    return value if isinstance(value, Markup) else clean(value) if isinstance(value, str) else value


def _file(name: str) -> str:
    return (resources.files("hf_continual.report") / "templates" / name).read_text(encoding="utf-8")


def configuration(run: Run) -> str:
    """A run's configuration and versions as YAML; a very long one is cut."""
    data = {**run.config, **({"versions": run.versions} if run.versions else {})}
    text = (
        yaml.safe_dump(json.loads(json.dumps(data, default=str)), sort_keys=False, allow_unicode=True) if data else ""
    )
    return text if len(text) <= LONGEST_CONFIG else f"{text[:LONGEST_CONFIG]}\n# cut here: {len(text):,} characters"


def diagnosis(data: dict[str, Any]) -> list[tuple[str, str]]:
    """What a diagnosis says in words and single numbers; series are pictures."""
    found = []
    for key, value in data.items():
        if isinstance(value, str | int | float | bool) and key != "format":
            found.append((key.replace("_", " "), str(value)))
        elif key == "remedies" and isinstance(value, list):
            lines = [_remedy(part) for part in value if isinstance(part, dict)]
            found.append(("what to do", "\n".join(lines)))
        elif key == "scores" and isinstance(value, dict):
            found += [(f"held rows, {when}", _held(score)) for when, score in value.items() if _held(score)]
        elif isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            found.append((key.replace("_", " "), "\n".join(value)))
    return found


def _remedy(part: dict[str, Any]) -> str:
    return f"{part.get('what')}: {part.get('why')}\n    {part.get('command')}"


def _held(score: Any) -> str:
    """The score of the rows that were never shown, with its interval."""
    cell = score.get("held") if isinstance(score, dict) else None
    if not isinstance(cell, dict) or not isinstance(cell.get("value"), int | float):
        return ""
    span = cell.get("interval")
    return f"{cell['value']:.3f}" + (f" (95 % interval {span[0]:.3f} to {span[1]:.3f})" if span else "")
