"""Wrong uses of the command line, of YAML and of Python: one message each that says where, what was found and what to do."""

from __future__ import annotations

import re

import pytest

from tests.first_hour import lines, typed
from tests.first_hour.uses import USES as PYTHON_USES

LINES = {**lines.USAGE, **lines.PLANS, **lines.TRAINING, **lines.FOLDERS}
# What a user of the command line cannot type.
PYTHON = re.compile(r"\b\w+=(True|False|None)\b")


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("furnished")
    typed.furnish(folder)
    return folder


def test_there_are_many():
    assert len(LINES) + len(PYTHON_USES) >= 150


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_line(line, furnished, capsys, monkeypatch):
    monkeypatch.chdir(furnished)
    code, _, err = typed.typed(line, capsys)
    said = " ".join(err.replace("│", " ").split())
    assert code in (2, 3), said
    assert "Traceback" not in said and "is unexpected" not in said and not PYTHON.search(said), said
    for part in LINES[line]:
        assert part in said, said


def test_nothing_was_written(furnished, capsys, monkeypatch):
    """A refused line leaves no output folder."""
    monkeypatch.chdir(furnished)
    typed.typed("run plan.yaml --set output=fresh --set 'methods={freeze: {bottom: 40}}'", capsys)
    assert not (furnished / "fresh").exists()


@pytest.mark.parametrize("use", PYTHON_USES)
def test_a_wrong_call(use, furnished, monkeypatch):
    monkeypatch.chdir(furnished)
    call, parts = PYTHON_USES[use]
    with pytest.raises((ValueError, TypeError, OSError, RuntimeError)) as refused:
        call()
    said = str(refused.value)
    for part in parts:
        assert part in said, said
