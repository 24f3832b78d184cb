"""Cards: golden files, what a reader and the Hub must find, the linter's rules, licences."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from hf_continual import AccuracyMatrix, Paper, render_card
from hf_continual.hub.contents import collect
from hf_continual.hub.facts import CardFacts, Evaluation, GaugeFacts, MergeFacts, MethodFacts, TaskFacts
from hf_continual.hub.files import write_card
from hf_continual.hub.folder_facts import read_facts
from hf_continual.hub.licences import License, LicenseConflict, hub_licenses, inherit
from hf_continual.hub.lint import lint_card, lint_folder
from hf_continual.hub.refs import ModelRef, is_hub_id, model_ref
from hf_continual.hub.text import KEEP, kept_text, merged_author, read_card, safe
from hf_continual.inference.names import NAMES
from hf_continual.methods.recadam import RecAdam
from tests.hub.cards import OUT, cards

BASE = ModelRef("org/base", "a" * 40, "mit")
EVALUATION = Evaluation(
    ("law", "tax", "tickets"), ((0.75,), (0.5, 0.875), (0.25, 0.5, 1.0)), (0.0, 0.125, 0.25), "exact match",
    rows={"law": 8, "tax": 8, "tickets": 8}, gauges=(GaugeFacts("general text", 3.5, 3.25, True, "nats", 90),
                                                   GaugeFacts("mmlu", 0.25, None, status="ERROR", error="out of memory")),
)  # fmt: skip
FACTS = CardFacts(
    "three", repo_id="me/three", kind="adapter", base=BASE,
    tasks=(TaskFacts("law", "org/law", "en", "train", "b" * 40, 1000, BASE, ModelRef("me/law")), TaskFacts("tax"), TaskFacts("tickets")),
    methods=(MethodFacts("recadam", {"pull": 0.01, "rows": "/home/me/rows.jsonl"}, RecAdam.paper),),
    evaluation=EVALUATION, license="mit", license_reason="the licence of org/base", languages=("en",), seed=1, steps=30,
)  # fmt: skip


@pytest.mark.parametrize("name", sorted({*cards(), *(p.name for p in OUT.glob("*.md") if p.name != "README.md")}))
def test_golden(name):
    assert cards()[name] == (OUT / name).read_text(encoding="utf-8"), "run `make cards` and read the difference"
    assert not lint_card(cards()[name])


def test_what_the_hub_reads():
    data, _ = read_card(render_card(FACTS))
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == ("org/base", "adapter", "peft")
    assert data["license"] == "mit" and data["datasets"] == ["org/law"] and data["language"] == ["en"]
    assert data["tags"] == ["continual-learning", "hf_continual", "recadam", "lora"]
    results = {r["dataset"]["name"]: r["metrics"] for r in data["model-index"][0]["results"]}
    assert [results[t][0]["value"] for t in EVALUATION.tasks] == [0.25, 0.5, 1.0]
    figures = {m["type"]: m["value"] for m in results["law, tax, tickets"]}
    assert figures == {k: v for k, v in EVALUATION.figures.items() if v is not None} and "fwt" not in figures


def test_what_a_reader_reads():
    card = render_card(FACTS)
    matrix = AccuracyMatrix([[0.75, None, None], [0.5, 0.875, None], [0.25, 0.5, 1.0]], [0.0, 0.125, 0.25])
    for said in (
        "learned 3 tasks one after another (law, tax, tickets)", f"**{matrix.overall_performance:.4f}**",
        f"| BWT | {matrix.backward_transfer:.4f} |", f"| Forgetting | {matrix.forgetting:.4f} |", "| FWT | NOT_RUN |",
        "| after law | 0.7500 | - | - |", "| base model | 0.0000 | 0.1250 | 0.2500 |", "| general text (nats, lower is better) | 3.5000 | 3.2500 | -0.2500 |",
        "ERROR: out of memory", "[org/law](https://huggingface.co/datasets/org/law) en (bbbbbbb)", "(aaaaaaa)", "pull=0.01, rows=rows.jsonl",
        RecAdam.paper.bibtex, "tickets", "law -0.5000, tax -0.3750", "local rows",
    ):  # fmt: skip
        assert said in card, said
    assert "/home/me" not in card and "None" not in card and "nan" not in card.lower().replace("finance", "")
    assert render_card(FACTS) == card


def test_only_what_is_known_is_printed():
    card = render_card(CardFacts("bare"))
    data, body = read_card(card)
    assert set(data) == {"library_name", "pipeline_tag", "tags"} and "NOT_RUN: no task was scored" in body
    assert "None" not in card and "seed" not in card and "| setting" not in card and not lint_card(card)


@pytest.mark.parametrize(
    ("facts", "base", "relation", "library"),
    [
        (CardFacts("a", kind="adapter", base=BASE), "org/base", "adapter", "peft"),
        (CardFacts("b", base=BASE), "org/base", "finetune", "transformers"),
        (CardFacts("c", base=BASE, parent=ModelRef("me/stage")), "me/stage", "finetune", "transformers"),
        (CardFacts("d", base=BASE, parent=ModelRef(name="stage")), "org/base", "finetune", "transformers"),
        (CardFacts("e", base=ModelRef(name="mine")), None, None, "transformers"),
        (CardFacts("f", base=BASE, merge=MergeFacts("recall", (ModelRef("me/a"), ModelRef(name="b"), ModelRef("me/c")))),
         ["org/base", "me/a", "me/c"], "merge", "transformers"),
        (CardFacts("g", merge=MergeFacts("kif", (ModelRef("me/a"), ModelRef(name="b")))), ["me/a"], "merge", "transformers"),
    ],
)  # fmt: skip
def test_base_model_and_relation(facts, base, relation, library):
    card = render_card(facts)
    data, _ = read_card(card)
    assert (data.get("base_model"), data.get("base_model_relation"), data["library_name"]) == (base, relation, library)
    assert not lint_card(card)


def test_merge_weights(tmp_path):
    merge = MergeFacts(
        "recall", (ModelRef("me/a"), ModelRef("me/b")), {"seed": 0}, Paper("RECALL", "Wang", 2025, "2510.20479"),
        {"layer.0": (0.25, 0.75), "layer.1": (0.5, 0.5)}, report="recall_report.json", call='merge_with_recall(["me/a", "me/b"], "out")',
    )  # fmt: skip
    (tmp_path / "recall_report.json").write_text("{}")
    write_card(tmp_path, CardFacts("m", base=BASE, merge=merge))
    card = (tmp_path / "README.md").read_text()
    assert "| me/a | 0.2500 | 0.3750 | 0.5000 |" in card and "(plots/merge_weights.png)" in card
    assert (tmp_path / "plots" / "merge_weights.png").read_bytes().startswith(b"\x89PNG")
    assert "2510.20479" in card and not lint_folder(tmp_path)
    assert read_facts(tmp_path).merge.weights == {"layer.0": [0.25, 0.75], "layer.1": [0.5, 0.5]}


def test_a_folder_gives_its_card_back(tmp_path):
    written = write_card(tmp_path, FACTS)
    again = read_facts(tmp_path)
    assert again.evaluation == replace(EVALUATION, matrix=again.evaluation.matrix)
    assert render_card(tmp_path) == (tmp_path / "README.md").read_text() == render_card(written)
    results = json.loads((tmp_path / "continual_results.json").read_text())
    assert {"matrix", "tasks", "base_row", "op", "bwt", "fwt", "forgetting"} <= set(results)
    matrix = AccuracyMatrix(results["matrix"], results["base_row"])
    assert (results["op"], results["bwt"], results["forgetting"]) == (
        matrix.overall_performance, matrix.backward_transfer, matrix.forgetting,
    )  # fmt: skip
    assert not lint_folder(tmp_path)
    before = {
        p: (p.stat().st_mtime_ns if p.suffix == ".png" else p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()
    }
    write_card(tmp_path, FACTS)
    assert before == {p: (p.stat().st_mtime_ns if p.suffix == ".png" else p.read_bytes()) for p in before}


def test_the_authors_text_stays(tmp_path):
    write_card(tmp_path, FACTS)
    file = tmp_path / "README.md"
    file.write_text(
        file.read_text()
        .replace("<!-- hf_continual:keep -->", "<!-- hf_continual:keep -->\nMine.")
        .replace("---\n", "---\nco2: 3\n", 1)
    )
    write_card(tmp_path, replace(FACTS, seed=2))
    assert (
        kept_text(file.read_text()) == "Mine."
        and read_card(file.read_text())[0]["co2"] == 3
        and "seed 2" in file.read_text()
    )
    data, _ = read_card(render_card(CardFacts("x"), file.read_text()))
    assert "base_model" not in data and "license" not in data, "a fact that became unknown stays unknown"


@pytest.mark.parametrize(
    ("mine", "theirs", "recorded", "kept"),
    [
        ("A", "A", None, "A"), ("", "B", None, "B"), ("A", "", None, "A"), ("A", "B", None, "B\n\nA"),
        ("A", "B", "A", "B"), ("B", "A", "A", "B"), ("B", "C", "A", "C\n\nB"),
    ],
)  # fmt: skip
def test_two_authors(mine, theirs, recorded, kept):
    def card(text):
        return render_card(CardFacts("x"), f"{'<!-- hf_continual:keep -->'}\n{text}\n<!-- /hf_continual:keep -->")

    assert kept_text(merged_author(card(mine), card(theirs), recorded)) == kept


def test_drafts_of_other_tools_are_not_the_authors():
    peft = (
        "---\nbase_model: /tmp/x\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n\n[More Information Needed]\n"
    )
    trl = "---\nlibrary_name: transformers\nlicence: license\n---\n\n# x\n\n## Quick start\n"
    by_hand = "---\nwidget: []\n---\n\n# Mine\n\nWords.\n"
    assert kept_text(peft) == kept_text(trl) == "" and kept_text(by_hand) == "# Mine\n\nWords."
    assert "/tmp/x" not in render_card(FACTS, peft) and "Words." in render_card(FACTS, by_hand)


def test_the_snippet_compiles_for_every_kind():
    for facts in (FACTS, replace(FACTS, kind="model"), replace(FACTS, chat=True)):
        code = re.search(r"```python\n(.*?)```", render_card(facts), re.DOTALL)[1]
        ast.parse(code)
        assert '"me/three"' in code and ("AutoPeftModel" in code) == (facts.kind == "adapter")


@pytest.mark.parametrize("kind", NAMES)
def test_the_snippet_of_what_changes_inference_uses_its_loader(kind):
    facts = replace(FACTS, kind="adapter", adapter={"kind": kind, "pool": 4})
    text = render_card(facts)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    ast.parse(code)
    assert (
        f'model = {NAMES[kind].loader}("me/three")' in code and f"from hf_continual import {NAMES[kind].loader}" in code
    )
    assert "AutoPeft" not in text and "A LoRA adapter" not in text and "- LoRA:" not in text and not lint_card(text)


GOOD = "---\nbase_model: org/base\nbase_model_relation: finetune\nlicense: mit\nlanguage: en\ntags: [a]\n---\n\n# T\n\nText.\n"
BAD = {
    "base_model: /tmp/model": "base_model", "base_model: [org/base, org/base]": "base_model", "base_model: None": None,
    "base_model_relation: child": "relation", "license: Apache-2.0": "license", "license: gpl-3.0-or-later": "license",
    "license: other": "license", "licence: mit": "license", "language: English": "language", "language: EN": "language",
    "tags: one": "tags", "tags: [null]": "tags", "datasets: [null]": "datasets", "datasets: [/data/x]": "datasets",
    "model-index: {}": "model-index", "model-index: [{name: x}]": "model-index", "library_name: peft": "relation",
    "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: n}, metrics: [{type: m, value: .nan}]}]}]": "model-index",
    "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: n, config: 3}, metrics: [{type: m, value: 1}]}]}]": "model-index",
    "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d}, metrics: [{type: m, value: 1}]}]}]": "model-index",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_metadata_rules(line):
    key = line.split(":")[0]
    head = "\n".join([x for x in GOOD.split("---\n")[1].splitlines() if not x.startswith(f"{key}:")] + [line])
    assert not lint_card(GOOD)
    found = {f.rule for f in lint_card(f"---\n{head}\n---\n\n# T\n")}
    assert BAD[line] in found if BAD[line] else not found


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("hf_" + "a" * 34, "token"), ("see /home/me/out/model", "path"), ("C:\\Users\\me\\x", "path"), ("[More Information Needed]", "placeholder"),
        ("```python\nprint(\n```", "snippet"), ('```python\nM.from_pretrained("./out")\n```', "snippet"), ("![a](plots/gone.png)", "image"),
        ("[a](gone.json)", "link"), ("fine https://huggingface.co/home/x and [x](https://a.b/tmp/c)", None),
    ],
)  # fmt: skip
def test_body_rules(text, rule, tmp_path):
    assert {f.rule for f in lint_card(GOOD + text + "\n", tmp_path)} == ({rule} if rule else set())


def test_broken_metadata():
    for text in ("---\na: 1\na: 2\n---\n", "---\n- a\n---\n", "---\na: [\n---\n", "---\na: 1\n", "# no metadata\n"):
        assert [f.rule for f in lint_card(text)] == ["metadata"], text


def test_numbers_that_do_not_agree(tmp_path):
    write_card(tmp_path, FACTS)
    file, card = tmp_path / "continual_results.json", tmp_path / "README.md"
    whole, text = file.read_text(), card.read_text()
    file.write_text(json.dumps({**json.loads(whole), "op": 0.9}))
    assert {f.rule for f in lint_folder(tmp_path)} == {"numbers"}
    file.write_text(whole)
    card.write_text(text.replace("value: 1.0", "value: 0.99"))
    assert ["model-index says task tickets=0.99" in f.message for f in lint_folder(tmp_path)] == [True]
    card.write_text(text.replace("0.8750", "0.9750"))
    assert ["0.8750, which the card does not show" in f.message for f in lint_folder(tmp_path)] == [True]


def test_card_check_on_the_command_line(tmp_path):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "hf_continual", *words], capture_output=True, text=True, check=False
        )

    write_card(tmp_path, FACTS)
    assert (ran := run("card", "check", str(tmp_path))).returncode == 0 and ran.stdout == "clean\n"
    (tmp_path / "plots" / "forgetting.png").unlink()
    assert (
        (ran := run("card", "check", str(tmp_path))).returncode == 2
        and "[image]" in ran.stdout
        and "1 finding\n" in ran.stdout
    )
    assert (
        ran := run("push", str(tmp_path), "me/x")
    ).returncode == 3 and "does not hold a complete model" not in ran.stdout
    assert "me/x was not pushed" in ran.stderr and "Traceback" not in ran.stderr


def test_licences():
    mit, apache, own = License("mit"), License("apache-2.0"), License("other", "mine", "LICENSE")
    assert len(hub_licenses()) == 83
    assert inherit({"a": mit, "b": mit}) == (mit, "the licence of a and b")
    assert inherit({"a": own})[0] == own
    assert inherit({"a": mit, "b": None})[0] is None and inherit({})[0] is None and inherit({"a": None})[0] is None
    with pytest.raises(LicenseConflict, match=r"a: mit, b: apache-2.0.*license='...'"):
        inherit({"a": mit, "b": apache})
    assert inherit({"a": mit, "b": apache}, "apache-2.0") == (apache, "chosen by the author")
    with pytest.raises(ValueError, match="not a licence id of the Hub"):
        inherit({}, "apache 2")


def test_names_of_models(tmp_path):
    assert all(map(is_hub_id, ("gpt2", "me/x", "me/x.y-1_z")))
    assert not any(map(is_hub_id, ("/tmp/x", "a/b/c", "./x", "-x", "a--b", "x..y", "", None, "x.git")))
    snapshot = f"/cache/models--me--x/snapshots/{'c' * 40}"
    assert model_ref(snapshot) == ModelRef("me/x", "c" * 40)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert model_ref(tmp_path / "mine") == ModelRef(license="mit", name="mine")
    with pytest.raises(ValueError, match="is not a valid Hub id"):
        ModelRef("/tmp/x")


def test_what_may_be_published():
    data = {
        "hub_token": "secret",
        "eos_token": "<eos>",
        "rows": "/home/me/a.jsonl",
        "n": [1, {"p": "~/x/y"}],
        "t": "hf_" + "a" * 30,
    }
    assert safe(data) == {"eos_token": "<eos>", "rows": "a.jsonl", "n": [1, {"p": "y"}], "t": "..."}
    assert "token" not in yaml.safe_dump(safe({"token": "x"}))


def findings(folder):
    return [(f.rule, f.message) for f in lint_folder(folder)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| after tickets | 0.2500 | 0.5000 | 1.0000 |", "| after tickets | 0.2500 | 0.5000 | 0.2500 |"),
        ("| after tickets | 0.2500 | 0.5000 | 1.0000 |", "| after tickets | 0.5000 | 0.2500 | 1.0000 |"),
        ("| base model | 0.0000 |", "| base model | 0.2500 |"), ("30 optimizer steps", "3,000 optimizer steps"),
        ("8 rows per task", "800 rows per task"), ("pull=0.01", "pull=0.1"), ("law -0.5000, tax -0.3750", "tax -0.3750"),
        ("| general text (nats, lower is better) | 3.5000 | 3.2500 | -0.2500 |\n", ""),
        ("## Limits and intended use", "It beats every other model.\n\n## Limits and intended use"),
    ],
)  # fmt: skip
def test_a_generated_line_that_was_edited_is_found(tmp_path, old, new):
    write_card(tmp_path, FACTS)
    file = tmp_path / "README.md"
    assert old in file.read_text() and not findings(tmp_path)
    file.write_text(file.read_text().replace(old, new))
    found = findings(tmp_path)
    assert found and {rule for rule, _ in found} == {"numbers"} and "Render" in found[0][1], found
    # The way out, on the command line.
    assert command("card", "render", str(tmp_path)).exit_code == 0 and not findings(tmp_path)


@pytest.mark.parametrize(
    ("said", "claimed"),
    [
        ("It reaches 97 % on MMLU.", "97 %"), ("Accuracy: 0.91 on law.", "0.91"), ("| GSM8K | 55.5 |", "55.5"),
        ("It answers 99.5% of all questions.", "99.5%"), ("It scores 89 on tax.", "89"),
        ("It reaches 97 % on MMLU ([log](https://example.org/log)).", None), ("It reaches 87.5 % on tax, and 25 % on law.", None),
        ("Its loss on general text is 3.25.", None), ("Trained in 2025 on 3 tasks, 8 rows each, with 2 GPUs.", None),
        ("Mean score 0.58.", None), ("```\naccuracy 0.99\n```", None),
    ],
)  # fmt: skip
def test_what_the_author_claims_is_compared_with_what_was_measured(tmp_path, said, claimed):
    write_card(tmp_path, FACTS)
    file = tmp_path / "README.md"
    file.write_text(file.read_text().replace("<!-- hf_continual:keep -->\n", f"<!-- hf_continual:keep -->\n{said}\n"))
    found = lint_folder(tmp_path)
    assert [f.rule for f in found] == ["claim"] * (claimed is not None), found
    assert all(f"{claimed!r}" in f.message and f.is_claim for f in found)
    by_hand = f"---\nlicense: mit\n---\n\n# Mine\n\n{said}\n"
    file.write_text(by_hand)
    assert [f.rule for f in lint_folder(tmp_path)] == ["claim"] * (claimed is not None)


def test_a_matrix_that_was_edited_everywhere_differs_from_the_scores(tmp_path):
    (tmp_path / "continual").mkdir()
    scores = {t: {"value": v} for t, v in zip(EVALUATION.tasks, EVALUATION.matrix[-1], strict=True)}
    (tmp_path / "continual" / "scores.json").write_text(json.dumps(scores))
    write_card(tmp_path, FACTS)
    assert not findings(tmp_path)
    write_card(
        tmp_path, replace(FACTS, evaluation=replace(EVALUATION, matrix=((0.75,), (0.5, 0.875), (0.25, 0.5, 0.875))))
    )
    assert [m for _, m in findings(tmp_path)] == [
        "continual_results.json says 0.875 for 'tickets', but continual/scores.json says 1.0."
    ]


def test_facts_that_are_gone_or_damaged_are_not_clean(tmp_path):
    write_card(tmp_path, FACTS)
    for name in ("continual_results.json", "continual_config.json"):
        whole = (tmp_path / name).read_text()
        for content in ("{", "[]", "null", '{"tasks": 3}'):
            (tmp_path / name).write_text(content)
            assert {rule for rule, _ in findings(tmp_path)} == {"numbers"}, (name, content)
        (tmp_path / name).unlink()
        assert any(f"made from {name}, which is not in the folder" in message for _, message in findings(tmp_path))
        (tmp_path / name).write_text(whole)


def gauge(value):
    return replace(EVALUATION, gauges=(GaugeFacts("general text", 3.5, value, True, "nats", 90),))


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        (gauge(9.44), "Outside its tasks it got worse: general text from 3.5000 to 9.4400."), (gauge(3.25), None),
        (replace(EVALUATION, matrix=((0.5,), (0.5, 0.5), (0.25, 0.75, 0.5))), "kept its best, but law lost 0.2500"),
        (replace(EVALUATION, matrix=((0.5,), (0.5, 0.5), (0.25, 1.0, 0.5))), "gained 0.1250 on its best, but law lost 0.2500"),
        (replace(EVALUATION, matrix=((0.5,), (0.5, 0.5), (0.5, 0.5, 0.5))), "no earlier task fell below its best."),
        (replace(EVALUATION, matrix=((0.5,), (0.5, 0.5), (0.5, 0.75, 0.5))), "an earlier task gained 0.1250 on its best."),
    ],
)  # fmt: skip
def test_the_summary_hides_nothing_that_got_worse(evaluation, said):
    card = render_card(replace(FACTS, evaluation=evaluation))
    assert said in card if said else "got worse" not in card


def command(*words):
    """A command in this process: exit code and output, as `hf-continual` gives them."""
    from typer.testing import CliRunner

    from hf_continual.cli import app

    return CliRunner().invoke(app, list(words))


def test_exit_codes_of_the_commands_about_cards(tmp_path):
    write_card(tmp_path / "a", FACTS)
    done = command("card", "check", str(tmp_path / "a"))
    assert (done.exit_code, done.output) == (0, "clean\n")
    alone = command("card", "check", str(tmp_path / "a" / "README.md"))
    assert alone.exit_code == 0 and "numbers were not checked: give the folder" in alone.output
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "README.md").write_text(GOOD)
    bare = command("card", "check", str(tmp_path / "b"))
    assert bare.exit_code == 0 and "not checked: there is no continual_results.json" in bare.output
    (tmp_path / "b" / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff\n")
    assert command("card", "check", str(tmp_path / "b")).exit_code == 0
    card = tmp_path / "a" / "README.md"
    card.write_text(card.read_text().replace("0.8750", "0.9750"))
    assert command("card", "check", str(tmp_path / "a")).exit_code == 2
    for words in (("card", "check", "nope"), ("card", "render", "nope"), ("card", "render", str(tmp_path / "b"))):
        assert command(*words).exit_code != 0


@pytest.mark.parametrize("harm", ["nothing there", "no model", "cut"])
def test_a_model_is_called_safe_only_where_it_is(tmp_path, harm):
    folder = tmp_path / "model"
    if harm != "nothing there":
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    if harm == "cut":
        (folder / "model.safetensors").write_bytes(b"\x08")
    pushed = command("push", str(folder), "me/x", "--dry-run")
    assert pushed.exit_code == 3 and "me/x was not pushed" in pushed.output and "is safe" not in pushed.output
    if harm == "nothing there":
        assert "does not exist (looked in" in pushed.output and "To push it again" not in pushed.output
    else:
        assert f"Once that is fixed: hf-continual push {folder} me/x" in pushed.output


def test_the_tags_of_trl_and_its_badges(tmp_path, monkeypatch):
    """What TRL would have written is now next to our own, so that the Hub finds and counts the model as before."""
    from hf_continual import ContinualConfig, ContinualTrainer
    from hf_continual.trainer import facts as module
    from tests import toy

    page = "https://me-runs.hf.space?project=p&runs=r&sidebar=collapsed"
    monkeypatch.setenv("JOB_ID", "1")
    monkeypatch.setattr(module, "get_trackio_space_url", lambda: page)
    monkeypatch.setattr("trl.trainer.base_trainer.get_trackio_space_url", lambda: page)
    trainer = ContinualTrainer(
        toy.model(), ContinualConfig(**toy.settings(tmp_path, max_steps=1)), train_dataset=toy.rows(),
        processing_class=toy.tokenizer(),
    )  # fmt: skip
    trainer.create_model_card()
    theirs = read_card((tmp_path / "README.md").read_text())[0]["tags"]
    (tmp_path / "README.md").unlink()
    trainer.save_model()
    data, body = read_card((tmp_path / "README.md").read_text())
    assert set(theirs) == {"generated_from_trainer", "trl", "sft", "hf_jobs", f"trackio:{page}"} <= set(data["tags"])
    assert {"continual-learning", "hf_continual"} <= set(data["tags"])
    assert f"]({page})" in body and 'alt="Visualize in Trackio"' in body
    assert not lint_folder(tmp_path)


WRITTEN = {
    "language:\n- no\n- en": "language:\n- 'no'\n- en",
    "language: no": "language: 'no'",
    "on: push\noff: Yes": "'on': push\n'off': 'Yes'",
    "version: 1.10": None,
    "parts: 007": None,
    "digits: 1_000": None,
    "inference:\n  parameters:\n    temperature: 0.70\n    rate: 1e-5": None,
    "start: 12:30": None,
    "day: 2024-01-05": None,
    "moment: 2024-01-05 10:00:00+02:00": None,
    "commit: '12e4567'": None,
    "verified: true\nsize: 3\nshare: 0.5": None,
}


@pytest.mark.parametrize("mine", WRITTEN)
def test_metadata_survives_as_the_author_wrote_it(tmp_path, mine):
    """In the card when rendered again, twice, and in the combination of two cards; the Hub's parser reads it as the same."""
    wanted = WRITTEN[mine] or mine
    write_card(tmp_path, CardFacts("small"))
    text = (tmp_path / "README.md").read_text().replace("---\n", f"---\n{mine}\n", 1)
    once = render_card(CardFacts("small"), text)
    for card in (once, render_card(CardFacts("small"), once), merged_author(once, "", None)):
        assert f"\n{wanted}\n" in card.split("\n---", 1)[0] + "\n"
    (tmp_path / "README.md").write_text(once)
    assert not lint_folder(tmp_path)


def test_a_number_in_place_of_a_name_is_still_found():
    said = [str(f) for f in lint_card("---\ntags:\n- 1.10\n---\n# x\n")]
    assert said and "tags holds 1.1, which is not a name" in said[0]


SHOWN = {
    "![chart](figures/chart.png)": "figures/chart.png",
    "![chart](./figures/chart.JPG 'after task 2')": "figures/chart.JPG",
    "![two words](<figures/two words.webp>)": "figures/two words.webp",
    "![two words](figures/two%20words.gif)": "figures/two words.gif",
    "![chart](figures/a/b/chart.svg?raw=true)": "figures/a/b/chart.svg",
    '<img width="20" src="figures/chart.jpeg">': "figures/chart.jpeg",
    "<img src='logo.jpg' alt='logo'/>": "logo.jpg",
    '<picture><source media="(dark)" srcset="figures/dark.png"></picture>': "figures/dark.png",
    '<img srcset="figures/small.png 1x">': "figures/small.png",
    "![chart][one]\n\n[one]: figures/chart.png": "figures/chart.png",
    "[![small](figures/small.png)](figures/small.png)": "figures/small.png",
}


@pytest.mark.parametrize("line", SHOWN)
def test_pictures_of_the_authors_text_are_pushed_or_missed(tmp_path, line):
    name = SHOWN[line]
    write_card(tmp_path, CardFacts("small"))
    save_file({"w": np.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card.replace(KEEP, f"{KEEP}\n{line}\n", 1))
    assert any("the image" in f and "is not in the folder" in f for _, f in findings(tmp_path))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"picture")
    (tmp_path / "other.jpg").write_bytes(b"nobody shows it")
    contents = collect(tmp_path)
    assert not findings(tmp_path) and name in contents.files and name not in contents.left_out
    assert contents.left_out == ("other.jpg",)


@pytest.mark.parametrize(
    "target, said",
    [
        ("../chart.png", "outside the folder"),
        ("figures/chart.tiff", "but is not pushed: only .png"),
        (".figures/chart.png", "is not pushed"),
        ("elsewhere/chart.png", "is not pushed"),
    ],
)
def test_pictures_that_cannot_be_pushed_are_said(tmp_path, target, said):
    folder = tmp_path / "model"
    write_card(folder, CardFacts("small"))
    save_file({"w": np.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (tmp_path / "aside").mkdir()
    (folder / "elsewhere").symlink_to(tmp_path / "aside")
    (folder / target).parent.mkdir(exist_ok=True)
    (folder / target).write_bytes(b"picture")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace(KEEP, f"{KEEP}\n![it]({target})\n", 1))
    assert any(said in f for _, f in findings(folder))
    assert not [n for n in collect(folder).files if "chart" in n]


def test_pictures_on_servers_and_in_code_are_no_files(tmp_path):
    write_card(tmp_path, CardFacts("small"))
    card = (tmp_path / "README.md").read_text()
    text = "![a](https://x.org/a.png) ![b](//x.org/b.png) `![c](c.png)`\n\n```\n![d](d.png)\n```\n"
    (tmp_path / "README.md").write_text(card.replace(KEEP, f"{KEEP}\n{text}\n", 1))
    assert not findings(tmp_path)
