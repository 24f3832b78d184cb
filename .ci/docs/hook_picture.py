"""Where a method acts: the hooks of a run as a picture, those that the method overrides filled."""

from __future__ import annotations

from collections.abc import Sequence

# The titles of hf_continual.methods.compose.STATIONS, by when they are called.
ROWS = {
    "once, before the first step": ("own modules", "model surgery", "rows", "before training"),
    "in every step": (
        "before a step",
        "token weights",
        "loss terms",
        "after forward",
        "gradients",
        "optimizer",
        "after step",
    ),
    "once, after the last step": ("task end",),
}
WIDTH, HEIGHT, LEFT, GAP = 104, 30, 8, 12


def picture(name: str, acts_on: Sequence[str]) -> str:
    """The picture as an SVG element, for a page.

    Args:
        name: The method's name.
        acts_on: Titles of the hooks that it overrides.

    Returns:
        One line of HTML; its colours are those of the page.

    Raises:
        ValueError: If a title has no place in the picture.
    """
    if unknown := set(acts_on) - {title for titles in ROWS.values() for title in titles}:
        raise ValueError(f"The picture of hooks has no place for {', '.join(sorted(unknown))}. Add it to ROWS.")
    parts, y = [], 16
    for when, titles in ROWS.items():
        parts.append(f'<text class="when" x="{LEFT}" y="{y}">{when}</text>')
        for place, title in enumerate(titles):
            parts.append(_box(LEFT + place * (WIDTH + GAP), y + 8, title, title in acts_on, place + 1 < len(titles)))
        y += HEIGHT + 34
    wide = LEFT + max(map(len, ROWS.values())) * (WIDTH + GAP)
    label = f"{name} acts on: {', '.join(acts_on)}"
    drawn = "".join(parts)
    return f'<svg class="hooks" viewBox="0 0 {wide} {y - 14}" role="img" aria-label="{label}">{drawn}</svg>'


def _box(x: int, y: int, title: str, acts: bool, more: bool) -> str:
    box = f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>'
    text = f'<text x="{x + WIDTH / 2:g}" y="{y + HEIGHT / 2 + 4:g}" text-anchor="middle">{title}</text>'
    line = f'<path d="M{x + WIDTH} {y + HEIGHT / 2:g}h{GAP}"/>' if more else ""
    return f'{line}<g class="{"acts" if acts else "rests"}">{box}{text}</g>'
