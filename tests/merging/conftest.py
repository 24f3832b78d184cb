"""Plots are drawn in this process, which saves a second of imports each; a test with `as_users` draws them as users do."""

from __future__ import annotations

import pytest

from hf_continual.merging.methods.recall import heat_map
from hf_continual.merging.methods.recall import method as recall_method


@pytest.fixture
def as_users():
    """Plots are drawn in a separate process."""


@pytest.fixture(autouse=True)
def _drawn_here(request, monkeypatch):
    if "as_users" in request.fixturenames:
        return

    def save(weights, models, file):
        heat_map.draw({"weights": weights, "models": models, "file": str(file)})

    monkeypatch.setattr(recall_method, "save_heat_map", save)
