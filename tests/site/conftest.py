"""The modules that build the site are in .ci/docs, which is not a package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / ".ci" / "docs"


@pytest.fixture(scope="session", autouse=True)
def builder():
    """Make the builder's modules importable, and leave the path as it was."""
    sys.path.insert(0, str(DOCS))
    yield DOCS
    sys.path.remove(str(DOCS))
