"""``python -m tests.stream.choosing`` rewrites recipes/choosing.md from the table of recommendations."""

from __future__ import annotations

from pathlib import Path

from hf_continual.stream.recommend import page

PAGE = Path(__file__).parents[2] / "recipes" / "choosing.md"

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
