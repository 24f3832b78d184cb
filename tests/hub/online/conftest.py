"""The Hub, emptied before each test; retries without waiting; a folder to push."""

from __future__ import annotations

import time

import pytest

from tests.hub.plugin import BLOCKED, HUB


@pytest.fixture
def hub(monkeypatch):
    HUB.reset()
    BLOCKED.clear()
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)  # the client's waits and ours
    HUB.waits = waits
    yield HUB
    assert not BLOCKED
