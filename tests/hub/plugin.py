"""A pytest plugin for processes that push: starts the Hub before anything of HF is imported, and blocks all other network access.

``pytest -p tests.hub.plugin tests/hub/online`` ; `tests/hub/test_online.py` starts these processes.
"""

from __future__ import annotations

import os
import socket
import tempfile

from tests.hub.server import TOKEN, Hub

HUB = Hub()
HOME = tempfile.mkdtemp(prefix="hub-home-")

os.environ.update(
    HF_ENDPOINT=HUB.url, HF_TOKEN=TOKEN, HF_HOME=HOME, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1", HF_CONTINUAL_HUB_TESTS="1",
)  # fmt: skip
os.environ.pop("TRANSFORMERS_OFFLINE", None)

_connect = socket.socket.connect
BLOCKED: list[object] = []


def connect(self, address):
    """Loopback only."""
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        BLOCKED.append(address)
        raise PermissionError(f"a test tried to reach {address}")
    return _connect(self, address)


socket.socket.connect = connect
