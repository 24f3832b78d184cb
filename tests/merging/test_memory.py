"""The merge phase holds chunks, not models; and imports nothing that it does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_continual.merging.average import Average
from hf_continual.merging.linear import merge_linear
from hf_continual.merging.members import open_members
from hf_continual.merging.model_output import model_tensors
from hf_continual.merging.shards import make_shards, memory_bound
from tests.merging.synthetic import write_model

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    elements = [write_model(folder / f"m{i}", i, layers=2) for i in range(2)]
    assert elements[0] > 90e6
    return [folder / "m0", folder / "m1"]


@pytest.mark.slow
@pytest.mark.parametrize("function", ["merge_linear", "merge_with_recall"])
def test_anonymous_memory_stays_within_32_mb_of_import_torch(models, tmp_path, function):
    call = [sys.executable, "-m", "tests.merging.synthetic", function, str(tmp_path / "out"), *map(str, models)]
    ran = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["imported"] == []
    assert found["memory"] <= 32 * MIB, f"{found['memory'] / MIB:.1f} MiB"
    assert found["bytes"] > 180e6


def test_the_bound_does_not_grow_with_models_or_tensors(models, tmp_path):
    for number in (2, 3, 8, 40):
        members, _ = open_members([*models] * (number // 2) + models[: number % 2], None)
        # distinct sources, as of different models
        for i, member in enumerate(members):
            object.__setattr__(member, "checkpoint", open_members([models[i % 2]], None)[0][0].checkpoint)
        outputs = model_tensors(members, lambda _, n=number: Average((1 / n,) * n), None, "strict", [])
        assert memory_bound(make_shards(outputs, 10**9)) < 24 * MIB
    with pytest.warns(UserWarning, match="are the same weights"):
        merge_linear([models[0], models[0]], tmp_path / "out", dry_run=True)
