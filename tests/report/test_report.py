"""The page: its numbers are the folder's, it calls nobody, and no text of a run becomes part of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ET

import pytest

from hf_continual.report.run import clean
from hf_continual.report.write import write_report
from hf_continual.stream.compare import compare_runs
from tests.report import world
from tests.report.pages import Page, calls

HOSTILE = (
    '<script>document.title="pwned"</script><img src="http://127.0.0.1:9/x" onerror="document.title=\'pwned\'">'
    ' $\\frac{1}{2$ & "q" \u202egnp.exe \x07 \ud800 </pre></dd></title></style>{{ 7*7 }}{% raw %} 漢字 😀'
)
NAMES = ("<img src=x onerror=document.title='pwned'>", '_hidden "task" $x^{2$', "漢字 & <script>alert(1)<|script>")
TAGS = set(
    "html head meta title style body header h1 h2 p nav a main section ul li figure figcaption div table thead tbody tr th td "
    "button small details summary pre dl dt dd form label input select option output article b span i script "
    "svg g defs path text use clippath rect image".split()
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, keep in (("plain", 0.3), ("replay", 0.9)):
        world.run(folder / name, keep=keep)
        world.gauges_during(folder / name)
    world.merged(folder / "replay")
    found = write_report([folder / "plain", folder / "replay"], folder / "out.html", figures=folder / "pictures")
    return folder, Page(folder / "out.html"), found


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    text = HOSTILE.replace("\ud800", "")  # files of predictions are UTF-8
    for name in ("a<i>b", "other"):
        world.run(folder / name, NAMES, keep=0.4, text=text, model="<svg onload=alert(1)>")
        world.gauges_during(folder / name, text)
        world.merged(folder / name, text=text)
    write_report([folder / "a<i>b", folder / "other"], folder / "out.html", figures=folder / "pictures", title=HOSTILE)
    return folder, Page(folder / "out.html")


def results(folder):
    return json.loads((folder / "continual_results.json").read_text(encoding="utf-8"))


def test_every_number_of_the_matrix_is_the_folders(runs):
    folder, page, _ = runs
    for name in ("plain", "replay"):
        told = results(folder / name)
        assert page.numbers(f"{name}: numbers") == [told["matrix"]["base"], *told["matrix"]["scores"]]
        assert page.headings[f"{name}: numbers"] == ["after learning", *told["tasks"]]


def test_every_figure_of_the_summary_is_the_folders(runs):
    folder, page, _ = runs
    heads = page.headings["Every run"]
    told = {name: results(folder / name) for name in ("plain", "replay")}
    for row in page.tables["Every run"]:
        own = told[row[0][0]]
        cells = dict(zip(heads, row, strict=True))
        for key, head in (("overall_performance", "overall performance"), ("backward_transfer", "backward transfer")):
            text, value = cells[head]
            low, high = own["intervals"][key]
            sign = "+" if key == "backward_transfer" else ""
            assert float(value) == own["summary"][key]
            assert text == f"{100 * own['summary'][key]:{sign}.1f}{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"
        assert float(cells["answers' loss"][1]) == own["nll"]["summary"]["overall_performance"]
        assert float(cells["general, change"][1]) == own["gauges"]["general"]["change"]


def test_paired_tests_are_those_of_compare_runs(runs):
    folder, page, found = runs
    tests = compare_runs(folder / "plain", folder / "replay")
    shown = {t["task"]: t for t in found["comparisons"]}
    assert {task: t["p_value"] for task, t in shown.items()} == {task: t.p_value for task, t in tests.items()}
    (row,) = page.tables["Is the difference more than chance?"]
    heads = dict(zip(page.headings["Is the difference more than chance?"], row, strict=True))
    assert float(heads["gain"][1]) == tests["overall"].difference and float(heads["p"][1]) == tests["overall"].p_value
    assert [int(heads[h][1]) for h in ("rows better", "rows worse", "rows")] == [
        tests["overall"].better, tests["overall"].worse, tests["overall"].n
    ]  # fmt: skip


def test_a_sweeps_numbers_are_the_sweeps(tmp_path):
    told = world.sweep(tmp_path / "sweep", {"plain": 0.3, "replay": 0.9})
    found = write_report([tmp_path / "sweep"], tmp_path / "out.html")
    page = Page(tmp_path / "out.html")
    assert not found["missing"] or all(
        any(word in m for word in ("gauges", "Not recorded", "layer", "update", "best plain")) for m in found["missing"]
    )
    for row in page.tables["Arms"]:
        figures = told["arms"][row[0][0]]["figures"]
        assert [float(v) for _, v in row[2:6]] == [figures[k]["mean"] for k in figures]
        low, high = figures["overall_performance"]["interval"]
        assert row[2][0].endswith(f"{100 * low:.1f} to {100 * high:.1f}")
    (test,) = page.tables["Is the difference more than chance?"]
    assert (
        float(test[3][1]) == told["comparisons"][0]["difference"]
        and float(test[4][1]) == told["comparisons"][0]["p_value"]
    )


def test_the_page_asks_nothing_of_anybody(runs, hostile):
    for page in (runs[1], hostile[1]):
        assert calls(page) == []
        assert page.tags["script"] == 1 and page.tags["style"] == 1
        assert not re.search(r"@import|url\(|https?:", page.styles[0])
        assert not re.search(r"fetch|XMLHttpRequest|https?:|import\(", page.scripts[0])
        assert {tag for tag in page.tags} <= TAGS, set(page.tags) - TAGS
        policy = next(v for t, n, v in page.attributes if t == "meta" and n == "content" and "default-src" in v)
        digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
        assert policy.startswith("default-src 'none'") and f"'sha256-{digest}'" in policy


def test_hostile_text_is_text(hostile):
    folder, page = hostile
    assert "<script>document" not in page.source.replace('<script>"use strict', "")
    text = clean(HOSTILE.replace("\ud800", ""))
    assert text in page.text and page.texts.count(clean(HOSTILE)) >= 2  # the title, twice
    assert "\u202e" not in page.source and "\x07" not in page.source and "49" not in page.texts[0]
    for name in NAMES:
        assert name in page.text
    changed = [value for tag, name, value in page.attributes if name == "data-task"]
    assert changed and set(changed) <= set(NAMES)
    for file in (folder / "pictures").glob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ET.parse(file).iter()}
        assert tags <= {"svg", "g", "defs", "path", "text", "use", "clipPath", "rect", "image", "metadata", "style"} | {
            "RDF", "Work", "type", "date", "format", "creator", "Agent", "title"
        }  # fmt: skip


def test_pictures_are_files_and_the_same_again(runs, tmp_path):
    folder, page, found = runs
    names = {p.name for p in (folder / "pictures").iterdir()}
    assert {n.removesuffix(".svg") for n in names if n.endswith(".svg")} == {
        n.removesuffix(".png") for n in names if n.endswith(".png")
    }
    assert {
        "matrix-1.svg",
        "matrix-2.png",
        "forgetting.svg",
        "comparison.png",
        "frontier.svg",
        "gauges.svg",
        "benchmarks.svg",
    } <= names
    assert page.tags["svg"] == len(names) / 2 == len(found["figures"]) / 2
    again = write_report([folder / "plain", folder / "replay"], tmp_path / "out.html", figures=tmp_path / "pictures")
    for name in names:
        assert (tmp_path / "pictures" / name).read_bytes() == (folder / "pictures" / name).read_bytes(), name
    assert (tmp_path / "out.html").read_bytes() == (folder / "out.html").read_bytes()
    assert again["missing"] == found["missing"]


def test_ids_of_a_page_are_used_once(runs):
    _, page, _ = runs
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for _, name, value in page.attributes:
        for used in re.findall(r"url\(#([^)]+)\)", value) + ([value[1:]] if name == "href" and value[0] == "#" else []):
            assert used in ids


def test_gauges_during_training_with_errors_and_rules(runs):
    folder, page, found = runs
    svg = (folder / "pictures" / "gauges.svg").read_text(encoding="utf-8")
    assert "general/loss" in svg and "general/forward_kl" in svg and "FillBetween" in svg
    rows = [[text for text, _ in row] for row in page.tables["What rules did"]]
    assert [row[2] for row in rows] == ["keep best", "rollback", "stop"] * 2
    assert rows[0] == [
        "plain",
        "law",
        "keep best",
        "general/loss > +0.1 ",
        "0.16 above the base for two evaluations ",
        "32",
    ]
    assert found["runs"][0]["events"][1] == {
        "task": "tickets", "step": 32.0, "event": "rollback", "rule": "general/loss > +0.1 ",
        "reason": "0.16 above the base for two evaluations ",
    }  # fmt: skip


def test_layers_of_merges_and_of_a_diagnosis(runs):
    _, page, found = runs
    for words in (
        "recall: weight of each model by layer",
        "kif: which side",
        "slerp: angle",
        "angle between the new update",
    ):
        assert words in page.text
    assert (
        "spurious" in page.text
        and "hf-continual train" in page.text
        and found["runs"][1]["diagnoses"] == {"diagnosis.json": "spurious"}
    )


def test_many_tasks_and_methods_make_one_page(tmp_path):
    names = [f"benchmark number {i:02d}" for i in range(20)]
    for i in range(6):
        world.run(tmp_path / f"method-{i}", names, keep=0.5 + 0.08 * i, rows=4, seed=i)
    found = write_report([tmp_path / f"method-{i}" for i in range(6)], tmp_path / "out.html", predictions=30)
    page = Page(tmp_path / "out.html")
    assert page.tags["article"] == sum(
        min(30, r["predictions"]["lost"] + r["predictions"]["regained"]) for r in found["runs"]
    )
    assert len(page.tables["Arms"]) == 6 and len(page.numbers("method-5: numbers")) == 21
    assert (tmp_path / "out.html").stat().st_size < 6e6
