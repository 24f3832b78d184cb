"""A diagnosis as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hf_continual.diagnosis.result import Diagnosis

MOMENTS = {
    "before": "BEFORE",
    "after": "AFTER",
    "recovered": "AFTER, after the short training",
    "base": "base",
    "control": "control: base, after the short training",
}


def headline(found: Diagnosis) -> str:
    """The verdict and why, in one line."""
    return f"{found.verdict} (confidence {found.confidence:.2f}): {found.reason}"


def diagnosis_report(found: Diagnosis) -> RenderableType:
    """Scores, layers, line, verdict and remedies."""
    parts: list[RenderableType] = [_scores(found), _layers(found)]
    if found.line:
        parts.append(_line(found))
    parts += [Text(note) for note in found.notes]
    parts.append(Text(f"\n{headline(found)}", style="bold"))
    for remedy in found.remedies:
        parts.append(Text(f"\n{remedy.what}: {remedy.why}.\n  {remedy.command}"))
    return Group(*parts)


def _scores(found: Diagnosis) -> Table:
    s = found.settings
    table = _table(f"{s['held']} held rows; {s['shown']} others were shown for {s['steps']} steps")
    for name in ("", "held", "95 % interval", "shown"):
        table.add_column(name, justify="left" if not name else "right")
    for moment, title in MOMENTS.items():
        if (score := found.scores.get(moment)) is not None:
            span = score["held"].get("interval")
            between = "" if not span else f"{span[0]:.3f} to {span[1]:.3f}"
            table.add_row(title, _number(score["held"]["value"]), between, _number(score["shown"]["value"]))
    return table


def _layers(found: Diagnosis) -> Table:
    table = _table("by layer: the new update, its angle to the old one, and the hidden states")
    for name in ("layer", "size", "angle", "by chance", "CKA", "states moved"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for entry in found.layers:
        angles = [f"{entry[k]:.1f}°" if entry[k] is not None else "" for k in ("angle", "chance")]
        table.add_row(
            str(entry["layer"]), _number(entry["size"]), *angles, _number(entry["cka"]), _number(entry["moved"])
        )
    return table


def _line(found: Diagnosis) -> Table:
    table = _table("on the line from BEFORE to AFTER")
    table.add_column("share of AFTER")
    for point in found.line:
        table.add_column(f"{point['share']:.0%}", justify="right")
    table.add_row("held score", *(_number(p["score"]) for p in found.line))
    if "nll" in found.line[0]:
        table.add_row("held NLL (nats)", *(_number(p["nll"]) for p in found.line))
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"
