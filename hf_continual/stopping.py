"""Stop on request: SIGTERM, SIGINT, SIGUSR1 and time limits end the process with exit code 75, and no work is lost.

A signal takes effect at once if all finished work is on disk, otherwise at the next safe point,
as in training. A second signal ends the process at once. To resume, start the process again on exit code 75.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
# A launcher forwards the Ctrl-C that the terminal has already sent to its processes: both are one request.
SAME_REQUEST = 2.0


class Stopped(SystemExit):
    """Raised where a process stops on request; if not caught, it ends the process with code 75.

    Args:
        why: What requested the stop, such as ``SIGTERM``.
        where: How far it was, such as ``at step 12 of 40``.
        kept: A sentence on what is saved.
    """

    def __init__(self, why: str, where: str = "", kept: str = "") -> None:
        super().__init__(EXIT_CODE)
        self.why, self.where, self.kept = why, where, kept

    def __str__(self) -> str:
        return f"Stopped by {self.why}{' ' if self.where else ''}{self.where}."


class _Process:
    """The stop requests of this process; signals belong to the process, so there is one instance."""

    def __init__(self) -> None:
        self.why: str | None = None
        self.since = 0.0
        self.by_clock = False
        self.deferrals = 0
        self.listeners = 0
        self.before: dict[int, Any] = {}
        self.pid = os.getpid()

    def take_signals(self) -> None:
        """Install handlers in place of the default ones; a user's handler, or an ignored signal, is left alone."""
        self.why, self.by_clock, self.deferrals, self.pid, self.before = None, False, 0, os.getpid(), {}
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers only in the main thread
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self.before[number] = signal.signal(number, self.on_signal)

    def give_back(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_signal(self, number: int, frame: Any) -> None:
        """Note the request, and stop at once if nothing would be lost."""
        if os.getpid() != self.pid:  # a worker that was forked meanwhile: its parent ends it
            if number == signal.SIGTERM:
                _die_of(number)
            return
        if (
            not self.listeners
        ):  # the listener has just left, or was interrupted while leaving: the earlier handler gets the signal
            self.give_back()
            signal.raise_signal(number)
            return
        if self.by_clock:
            self.by_clock = False
        elif self.why is None:
            self.why, self.since = signal.Signals(number).name, time.monotonic()
        elif int(os.environ.get("WORLD_SIZE", "1")) == 1 or time.monotonic() - self.since > SAME_REQUEST:
            _die_of(number)
        else:
            return
        if not self.deferrals:
            raise Stopped(self.why or signal.Signals(number).name)

    def on_time_limit(self, minutes: float) -> None:
        """Called in a timer's thread: send this process a signal, so that the main thread is interrupted."""
        if self.why is not None or os.getpid() != self.pid:
            return
        self.why, self.since = f"max_minutes={minutes:g}", time.monotonic()
        number = getattr(signal, "SIGUSR1", None)
        if number in self.before:
            self.by_clock = True
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, number)


_process = _Process()


def _die_of(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def listening(resumes: str | Callable[[], str], minutes: float | None = None) -> Iterator[None]:
    """Obey signals and a time limit inside the context; the outermost one says what to do after a stop.

    Args:
        resumes: A sentence on how to resume the work, or a function that returns it.
        minutes: Time limit from now on.

    Yields:
        None: While signals are obeyed.

    Raises:
        Stopped: If the process was asked to stop.
    """
    outermost = not _process.listeners
    if outermost:
        _process.take_signals()
    _process.listeners += 1
    timer = None if minutes is None else threading.Timer(60 * minutes, _process.on_time_limit, [minutes])
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    except Stopped as stopped:
        if outermost and os.environ.get("RANK", "0") == "0":
            sentences = (str(stopped), stopped.kept, resumes if isinstance(resumes, str) else resumes())
            logger.warning("%s", " ".join(s for s in sentences if s))
        raise
    finally:
        if timer is not None:
            timer.cancel()
        _process.listeners -= 1
        if outermost:
            _process.give_back()


@contextmanager
def deferred() -> Iterator[None]:
    """Only remember requests inside the context; the code in it checks `asked` at its safe points.

    Yields:
        None: While requests are remembered.
    """
    _process.deferrals += 1
    try:
        yield
    finally:
        _process.deferrals = max(_process.deferrals - 1, 0)


def asked() -> str | None:
    """What requested a stop of this process, or None."""
    return _process.why if _process.listeners else None


def is_outermost() -> bool:
    """Whether this is the outermost `listening` context."""
    return _process.listeners == 1


def check() -> None:
    """Stop here if this process was asked to."""
    if (why := asked()) is not None and not _process.deferrals:
        raise Stopped(why)


def stop(where: str, why: str | None = None, kept: str = "") -> NoReturn:
    """Stop here.

    Args:
        where: How far the work has got.
        why: What requested the stop, if another process of the run received it.
        kept: A sentence on what is saved.

    Raises:
        Stopped: Always.
    """
    raise Stopped(asked() or why or "another process of the run", where, kept)
