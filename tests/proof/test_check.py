"""The second computation: by hand, against the library's, and on files that were changed."""

from __future__ import annotations

import ast
import copy
import sys
from pathlib import Path

import pytest

from hf_continual.metrics import AccuracyMatrix
from recipes.proof import check
from tests.proof.made_up import result


def test_it_imports_numpy_and_the_standard_library_only():
    tree = ast.parse(Path(check.__file__).read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"numpy"}


def test_by_hand():
    made = result("x", old=[1.0, 2.0, 3.0, 4.0], general=[1.0, 1.0, 1.0, 2.0], learned=[1, 1, 1, 0], kept=[1, 0, 0, 0])
    found = made["figures"]
    assert made["matrix"] == [[0.75, None], [0.25, 0.75]] and made["nll"] == [[1.0, None], [2.5, 1.0]]
    assert (found["op"], found["bwt"], found["forgetting"], found["learned"]) == (0.5, -0.5, 0.5, 0.75)
    assert (found["old_loss"], found["general_loss"], found["fwt"]) == (2.5, 13 / 8, None)


def test_the_library_computes_the_same():
    made = result("x", learned=[1, 1, 0, 0], kept=[1, 0, 0, 0])
    summary = AccuracyMatrix(made["matrix"], made["base"]).summary
    names = {
        "op": "overall_performance",
        "bwt": "backward_transfer",
        "forgetting": "forgetting",
        "learned": "learning_accuracy",
    }
    assert {k: made["figures"][k] for k in names} == pytest.approx({k: summary[v] for k, v in names.items()})


@pytest.mark.parametrize(
    "path", [("matrix", 1, 0), ("nll", 0, 0), ("base", 1), ("figures", "bwt"), ("figures", "general_loss")]
)
def test_a_changed_number_is_found(path):
    made = result("x")
    assert check.check(made, None) == []
    changed = copy.deepcopy(made)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] += 1e-3
    assert len(check.check(changed, None)) == 1
