"""Pictures are drawn in this process, which saves a second of imports each; a test that asks for `as_users` does as they do."""

from __future__ import annotations

import pytest

from hf_continual.merging.methods.recall import heat_map
from hf_continual.merging.methods.recall import method as recall_method


@pytest.fixture
def as_users():
    """Pictures are drawn by a process of their own."""


@pytest.fixture(autouse=True)
def _drawn_here(request, monkeypatch):
    if "as_users" in request.fixturenames:
        return

    def save(weights, models, file):
        heat_map.draw({"weights": weights, "models": models, "file": str(file)})

    monkeypatch.setattr(recall_method, "save_heat_map", save)
