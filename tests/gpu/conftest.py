"""Each test on the CPU with tiny sizes, and the same on a card, marked gpu; on a card results are kept as they come."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: needed for deterministic products

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RESULTS: list = []  # the file of results, once there is one
# What runs on the CPU by default; the rest of the CPU's cases is exhaustive, as other tests have trained them there.
QUICK = (
    "test_bit_for_bit[cpu-packed-lora]",
    "test_equality.py::test_bf16_autocast[cpu]",
    "test_the_optimizer_that_was_asked_for[cpu-adamw_torch_fused]",
    "test_optimizers_at_zero_strength_are_adamw[cpu",
    "test_no_more_waits_than_sfttrainer[cpu-none]",
    "test_packed_rows_have_the_loss_of_padded_ones[cpu]",
)


def pytest_collection_modifyitems(items):
    """Mark the CPU's cases that are not quick."""
    for item in items:
        given = getattr(item, "callspec", None)
        here = given is not None and given.params.get("device") == "cpu"
        if here and "tests/gpu" in item.nodeid and not any(name in item.nodeid for name in QUICK):
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(params=DEVICES)
def device(request) -> Iterator[str]:
    """``cpu`` or ``cuda``, with deterministic kernels."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def card() -> str:
    """``cuda``; skipped without a card."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


def pytest_runtest_logreport(report):
    """Keep each test's outcome in $OUT/tests.json while run.sh of recipes/proof/gpu runs."""
    if "GPU_COMMIT" not in os.environ or not (report.when == "call" or report.outcome != "passed"):
        return
    if not RESULTS:
        sys.path.insert(0, "recipes/proof/gpu")
        from results import Results

        RESULTS.append(Results("tests"))
    said = str(report.longrepr)[-1500:] if report.outcome != "passed" else ""
    entry = {
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "said": said,
        **dict(report.user_properties),
    }
    RESULTS[0].add(report.nodeid, entry)
