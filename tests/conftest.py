"""One thread, no network, no progress bars; fixtures over `tests.toy`."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch
from transformers.utils import logging as hf_logging

torch.set_num_threads(1)  # threads fighting for the cores of a small machine made runs 12 times slower
datasets.disable_progress_bars()
hf_logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def log_level():
    """Commands run inside the tests' process set it for their own; the next test has it as it was."""
    logger = logging.getLogger("hf_continual")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def tokenizer():
    from tests import toy

    return toy.tokenizer()
