"""Progress bars of what takes more than a few seconds; none where nobody looks."""

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
    """Show no bar in this process from now on."""
    _SHOWN["bars"] = False


@contextmanager
def counting(total: int, what: str, unit: str) -> Iterator[Any]:
    """A bar that is moved by hand, on the standard error of a terminal.

    Args:
        total: How many there are.
        what: What is done, for the bar.
        unit: What is counted.

    Yields:
        tqdm: Call its ``update(n)``.
    """
    # None leaves it to tqdm, which shows nothing where the output is not a terminal.
    hidden = None if _SHOWN["bars"] else True
    with tqdm(total=total, desc=what, unit=unit, delay=DELAY, leave=False, disable=hidden) as shown:
        yield shown


def over(items: Iterable[Item], what: str, unit: str) -> Iterator[Item]:
    """The items, with a bar."""
    with counting(len(items) if isinstance(items, Sized) else 0, what, unit) as shown:
        for item in items:
            yield item
            shown.update(1)
