"""Tests in `online` need a process whose HF client was pointed at the loopback Hub before it was imported."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("HF_CONTINUAL_HUB_TESTS") else ["online/*"]
