"""Learning against retention as a picture: one method among the arms of recipes/frontier, with the line of plain learning rates."""

from __future__ import annotations

from html import escape
from typing import NamedTuple

from tables import tables

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 250, 44, 60, 14, 40


class Arm(NamedTuple):
    """One row of the table: its name, what was learned in percent, and the change on general text in nats."""

    name: str
    learned: float
    lost: float


def arms() -> list[Arm]:
    """The rows of the table."""
    (table,) = [table for table in tables("recipes/frontier/README.md") if table.head.startswith("| arm |")]
    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in table.rows]
    return [Arm(cell[0].strip("`"), float(cell[1]), float(cell[3])) for cell in cells]


def picture(name: str) -> str:
    """The picture as one line of HTML, with one arm named.

    Args:
        name: The arm of the method; the others are dots whose name shows when pointed at.

    Returns:
        An SVG element, or nothing if the table has no such arm.
    """
    found = arms()
    if name not in {arm.name for arm in found}:
        return ""
    most = max(arm.lost for arm in found) * 1.05
    plain = sorted((arm for arm in found if arm.name.startswith("plain")), key=lambda arm: arm.lost)
    line = " ".join("{:.1f},{:.1f}".format(*_place(arm, most)) for arm in plain)
    parts = [*_axes(most), f'<polyline class="line" points="{line}"/>']
    parts += [_dot(arm, most, arm.name == name) for arm in sorted(found, key=lambda arm: arm.name == name)]
    label = f"{name} and plain fine-tuning at four learning rates: learned against lost"
    return (
        f'<svg class="frontier" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def _place(arm: Arm, most: float) -> tuple[float, float]:
    x = LEFT + (WIDTH - LEFT - RIGHT) * max(arm.lost, 0) / most
    return x, TOP + (HEIGHT - TOP - BOTTOM) * (1 - arm.learned / 100)


def _axes(most: float) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>']
    for percent in (0, 50, 100):
        y = _place(Arm("", percent, 0), most)[1]
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>')
    for nats in range(int(most) + 1):
        x = _place(Arm("", 0, nats), most)[0]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{nats}</text>')
    parts.append(
        f'<text x="{(LEFT + right) / 2:g}" y="{HEIGHT - 6}" text-anchor="middle">general text lost, nats per token</text>'
    )
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text transform="rotate(-90 11 {middle:g})" x="11" y="{middle:g}" text-anchor="middle">learned, %</text>'
    )
    return parts


def _dot(arm: Arm, most: float, named: bool) -> str:
    x, y = _place(arm, most)
    kind = "named" if named else "plain" if arm.name.startswith("plain") else "other"
    said = f"{arm.name}: {arm.learned:g} % learned, {arm.lost:+g} nats"
    shown = (
        f'<text x="{x + 8:.1f}" y="{y + (-8 if named else 14):.1f}">{escape(arm.name)}</text>'
        if kind != "other"
        else ""
    )
    return f'<g class="{kind}"><circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if named else 4}"><title>{escape(said)}</title></circle>{shown}</g>'
