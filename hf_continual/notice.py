"""Sentences that a user should see even where no logging is set up: what a run will start from, for example."""

from __future__ import annotations

import logging
import os
import sys


def notice(logger: logging.Logger, text: str) -> None:
    """Log a sentence; where logging is not set up to show it, print it on the standard error of the first process.

    Args:
        logger: The caller's logger.
        text: The sentence.
    """
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", text)
    elif os.environ.get("RANK", "0") == "0" and logger.getEffectiveLevel() <= logging.WARNING:
        sys.stderr.write(text + "\n")
