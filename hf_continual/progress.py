"""Progress bars for work of more than a few seconds; none if the output is not a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")

_SHOWN = {"bars": True}
# Seconds after which a bar appears, so that short work shows none.
DELAY = 3.0


def be_quiet() -> None:
    """Turn off all bars in this process."""
    _SHOWN["bars"] = False


@contextmanager
def counting(total: int, what: str, unit: str) -> Iterator[Any]:
    """A bar that is updated by hand, on the standard error of a terminal.

    Args:
        total: Number of items.
        what: Title of the bar.
        unit: Unit of the items.

    Yields:
        tqdm: Call its ``update(n)``.
    """
    # None leaves it to tqdm, which shows nothing if the output is not a terminal.
    hidden = None if _SHOWN["bars"] else True
    with tqdm(total=total, desc=what, unit=unit, delay=DELAY, leave=False, disable=hidden) as shown:
        yield shown


def over(items: Iterable[Item], what: str, unit: str) -> Iterator[Item]:
    """Yield the items, with a bar."""
    with counting(len(items) if isinstance(items, Sized) else 0, what, unit) as shown:
        for item in items:
            yield item
            shown.update(1)
