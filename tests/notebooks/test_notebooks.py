"""Every notebook runs from top to bottom, shows the promised result, and is stored with the outputs of such a run."""

from __future__ import annotations

import re

import nbformat
import pytest

from tests.notebooks.run import NOTEBOOKS, run

# The sweep of five runs takes most of the time of all; `make test-all` runs it.
LONG = ("04_choosing",)
NOISE = re.compile(
    r"\r|\d+%\||it/s|s/it|WARNING|Warning|Traceback|train_runtime|/tmp/|/home/|/root/|hf_(?!continual)[A-Za-z]{8}"
)


def shown(book):
    """The last text of each code cell that shows one, without colours."""
    texts = []
    for cell in book.cells:
        for out in cell.get("outputs", []):
            said = out.get("text") or out.get("data", {}).get("text/plain", "")
            texts.append(re.sub(r"\x1b\[[0-9;]*m", "", said))
    return texts


def percent(text):
    """The percentages in a text."""
    return [int(number) for number in re.findall(r"(\d+) %", text)]


def check(name, texts):
    """The result that a notebook promises."""
    if name == "01_first_task":
        first, plain, kept = (percent(t) for t in texts if "%" in t)
        assert first[0] >= 90 and plain[0] < 50 <= plain[1] and min(kept) >= 80
        assert "replay/share" in texts[-2] and '"recadam"' in texts[-1]
    elif name == "02_task_sequence":
        plain, kept = eval(texts[-1])  # a list of two numbers
        assert plain < 0.5 < 0.8 <= kept
    elif name == "03_diagnosis":
        assert [verdict for verdict, _ in eval(texts[-1])] == ["spurious", "real"]
    elif name == "04_choosing":
        scores = eval(texts[-1])
        assert min(scores["replay-seed0"]) >= 0.8 and min(scores["replay and pull-seed0"]) >= 0.8
        assert all(old < 0.5 for run, (old, _) in scores.items() if not run.startswith("replay"))
        assert "kl-to-base" in "".join(texts)
    elif name == "05_merge_and_publish":
        merged = next(eval(t) for t in texts if "half-way" in t)
        alone, average = (min(percent(str(merged[k]))) for k in ("cities", "average"))
        assert alone < 30 < 60 <= average
        assert "merged from 2 models" in "".join(texts) and texts[-1].endswith("True)")
    else:
        assert name == "06_own_method"
        pulled = next(eval(t) for t in texts if t.startswith("{0.0"))
        assert percent(str(pulled[0.0]))[0] < 20 <= percent(str(pulled[0.02]))[0] and percent(str(pulled[0.1]))[0] >= 80
        assert texts[-2] == "(True, True)" and min(percent(texts[-1])) >= 80


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_stored_with_its_outputs_and_no_noise(path):
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run python -m tests.notebooks.run"
    assert not [
        out for cell in code for out in cell.outputs if out.output_type == "error" or out.get("name") == "stderr"
    ]
    assert not [found.group() for text in shown(book) if (found := NOISE.search(text))]
    check(path.stem, shown(book))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=pytest.mark.exhaustive if p.stem in LONG else []) for p in NOTEBOOKS]
)
def test_it_runs(path, monkeypatch):
    for name in ("PYTHONWARNINGS", "PYDEVD_DISABLE_FILE_VALIDATION", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # put back what the run sets
    check(path.stem, shown(run(path)))
