"""Messages that a user should see even without logging set up, such as what a run starts from."""

from __future__ import annotations

import logging
import os
import sys


def notice(logger: logging.Logger, text: str) -> None:
    """Log a message; if logging is not set up to show it, print it to the first process's standard error.

    Args:
        logger: The caller's logger.
        text: The sentence.
    """
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", text)
    elif os.environ.get("RANK", "0") == "0" and logger.getEffectiveLevel() <= logging.WARNING:
        sys.stderr.write(text + "\n")
