"""The checks of a release gate as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from hf_continual.stream.gate_check import Check
from hf_continual.stream.report import Blocks, p_text


def checks_table(checks: Sequence[Check]) -> Blocks:
    """One line per check."""
    lines = []
    for c in checks:
        span = "" if c.interval is None else f"{c.interval[0]:.3f} to {c.interval[1]:.3f}"
        p = "" if c.p_value is None else p_text(c.p_value)
        lines.append(
            [c.name, c.verdict, f"{c.value:.3f}", span, f"{c.kind.replace('_', ' ')} {c.limit:g}", p, f"{c.n:,}"]
        )
    return Blocks(["figure", "verdict", "value or change", "interval", "limit", "p", "rows"], lines)
