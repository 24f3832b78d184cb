"""The cards of a sweep's runs, once all of it was measured: what each is worth against the best plain run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_continual.hub.files import write_card
from hf_continual.hub.folder_facts import has_facts, read_facts


def add_best_plain(folders: Iterable[tuple[str, Path]], results: Mapping[str, Any]) -> None:
    """Write the comparison with the best plain run into the cards of last models.

    Args:
        folders: Arm, and folder of the last model, of each run.
        results: The return value of `hf_continual.stream.sweep.compare`.
    """
    tests = {test["second"]: test for test in results["best_plain"]}
    for arm, folder in folders:
        if arm in tests and has_facts(folder):
            facts = read_facts(folder)
            write_card(folder, replace(facts, evaluation=replace(facts.evaluation, best_plain=tests[arm])))
