"""Every snippet of the pages: parsed and checked always, executed as typed with a tiny model."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import hf_continual
from tests.first_hour.typed import typed
from tests.site import workshop
from tests.site.snippets import ROOT, check_calls, check_command, check_yaml, commands, pages, snippets

ALL = [snippet for page in pages() for snippet in snippets(page)]
KNOWN = {"python", "yaml", "commands", "bibtex", "text", "json"}
# Pages whose code is run in `make test`; the others with `make test-all`. tests/first_hour runs the first snippets.
QUICK = ("recipes/guide/extending.md",)
ELSEWHERE = {
    "README.md": "tests/first_hour/test_as_written.py",
    "recipes/guide/quickstart.md": "tests/first_hour/test_as_written.py",
    "recipes/guide/publishing.md": "tests/hub/online",  # needs the Hub
}


def of(language, page=None):
    return [s for s in ALL if s.language == language and page in (None, s.page)]


def test_every_block_is_of_a_known_kind():
    assert {s.language for s in ALL} <= KNOWN
    assert len(of("python")) > 15 and len(of("yaml")) > 15 and len(of("commands")) > 20


@pytest.mark.parametrize("snippet", of("commands"), ids=lambda s: s.name)
def test_every_command_is_there_with_its_options(snippet):
    for line in commands(snippet):
        check_command(line)


def test_commands_that_are_written_are_there(builder):
    from command_page import command_page
    from paper_index import paper_index

    for text in (command_page(), paper_index()):
        lines = re.findall(r"^hf-continual .*", text, re.M)
        assert len(lines) > 10
        for line in lines:
            check_command(line.partition(" > ")[0])


@pytest.mark.parametrize("snippet", of("yaml"), ids=lambda s: s.name)
def test_every_yaml_is_what_it_says(snippet, tmp_path):
    assert check_yaml(snippet.text, tmp_path) in ("plan", "keys", "gate", "merge", "configuration", "another trainer's")


@pytest.mark.parametrize("snippet", of("python"), ids=lambda s: s.name)
def test_every_call_takes_what_it_is_given(snippet):
    check_calls(snippet.text)


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (check_command, "hf-continual run plan.yaml --dryrun"),
        (check_command, "hf-continual merge ties a b --densty 0.1"),
        (check_command, "make dmeo"),
        (check_command, "pytest tests/methods/test_contrac.py -k mine"),
        (check_command, "python recipes/biography/run.py --sedes 2"),
        (check_command, "rm everything"),
        (check_calls, "Replay(rows, ratoi=0.1)"),
        (lambda text: check_yaml(text, ROOT / "build"), "methods: [{replay: {row: x}}]"),
        (lambda text: check_yaml(text, ROOT / "build"), "tsks: []"),
    ],
)
def test_what_is_wrong_is_found(check, text):
    (ROOT / "build").mkdir(exist_ok=True)
    with pytest.raises((Exception, SystemExit)):  # click, typer and pydantic each have their own
        check(text)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    workshop.build(folder)
    return folder


@pytest.fixture
def here(shop, tmp_path, monkeypatch):
    """A copy of the workshop as the current folder, with configurations that train one step."""
    shutil.copytree(shop, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    monkeypatch.setattr(hf_continual, "ContinualConfig", workshop.smaller(hf_continual.ContinualConfig))
    before = set(sys.modules)
    yield tmp_path / "here"
    for name in set(sys.modules) - before:
        if name in ("pull_back", "median", "first_word"):
            del sys.modules[name]


def run_python(page, here):
    """All blocks of a page in one namespace; a block that begins with the name of a file is that file."""
    names = {**workshop.public(), **workshop.names(here)}
    for snippet in of("python", page):
        code = workshop.in_small(snippet.text, here)
        if file := re.match(r"# ([\w/]+\.py)\n", code):
            compile(code, file[1], "exec")
            (here / file[1]).parent.mkdir(parents=True, exist_ok=True)
            (here / file[1]).write_text(code, encoding="utf-8")
        else:
            exec(compile(code, page, "exec"), names)
    return names


def run_commands(page, here, capsys):
    for snippet in of("commands", page):
        for line in commands(snippet):
            if line.startswith("hf-continual "):
                code, _, err = typed(workshop.small_line(line, here), capsys)
                assert code in ((0, 2, 4) if line.startswith("hf-continual gate") else (0,)), (line, err)


def test_extending_as_a_reader_types_it(here, capsys, monkeypatch):
    """A method, a merge rule and a scorer: in Python, and from the command line."""
    names = run_python("recipes/guide/extending.md", here)
    assert {"PullBack", "merge"} <= set(names) and (here / "middle" / "model.safetensors").is_file()
    shutil.copytree(here / "model", here / "out", dirs_exist_ok=True)
    run_commands("recipes/guide/extending.md", here, capsys)
    assert (here / "middle-too" / "model.safetensors").is_file() and (here / "out" / "pulled").is_dir()
    one, other = ((here / f / "model.safetensors").read_bytes() for f in ("middle", "middle-too"))
    assert one == other


def test_the_readers_method_keeps_the_contract(here):
    """Zero strength is plain fine-tuning, and a resumed run is the uninterrupted one, bit for bit."""
    import torch

    from tests import toy

    run_python("recipes/guide/extending.md", here)
    from pull_back import PullBack

    def train(out, methods, steps=4, resume=False):
        settings = toy.settings(here / out, max_steps=steps, save_strategy="steps", save_steps=2)
        trainer = hf_continual.ContinualTrainer(
            toy.model(), hf_continual.ContinualConfig(**{**workshop.SMALL, **settings}), train_dataset=workshop.rows(),
            processing_class=toy.tokenizer(), methods=methods,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume or None)
        return toy.flat(trainer.model)

    assert torch.equal(train("a", [PullBack(fraction=0.0)]), train("b", []))
    straight = train("c", [PullBack(fraction=0.1)])
    assert not torch.equal(straight, train("d", []))
    shutil.rmtree(here / "c" / "checkpoint-4")
    assert torch.equal(straight, train("c", [PullBack(fraction=0.1)], resume=True))
    with pytest.raises(ValueError, match=r"fraction=1"):
        PullBack(fraction=1)


def test_gauges_are_a_configuration(here):
    """The snippet is an expression: it must be accepted as it stands."""
    assert run_python("recipes/guide/watching.md", here)


REST = [
    p
    for p in pages()
    if of("python", p) and p not in (*QUICK, *ELSEWHERE, "recipes/guide/watching.md", "recipes/kif/README.md")
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", REST)
def test_the_python_of_a_page(page, here):
    if page == "recipes/task_vector/README.md":
        shutil.copytree(here / "law", here / "out" / "task")
        shutil.copytree(here / "tax", here / "out" / "task" / "checkpoint-500")
    run_python(page, here)


@pytest.mark.exhaustive
def test_the_python_of_kif(here):
    """It fuses what three runs left: an adapter, two that continued it, and a checkpoint in the middle of a round."""
    from peft import LoraConfig

    from hf_continual import KIF, ContinualConfig, ContinualTrainer

    def train(start, out, methods=(), seed=1, **options):
        peft = (
            {}
            if start != "model"
            else {"peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")}
        )
        trainer = ContinualTrainer(
            start, ContinualConfig(out, **options), train_dataset=workshop.rows(seed), methods=list(methods), **peft
        )
        trainer.train()
        trainer.save_model()

    train("model", "earlier")
    shutil.rmtree("law"), shutil.rmtree("tax")
    train("earlier", "law", seed=2), train("earlier", "tax", seed=3)
    train(
        "earlier",
        "run",
        [KIF(memory=workshop.rows(3), inner_steps=30, outer_steps=1)],
        max_steps=30,
        save_strategy="steps",
        save_steps=20,
    )
    for name in ("law", "tax"):
        workshop.rows(4).to_json(f"{name}.jsonl")
    run_python("recipes/kif/README.md", here)
    assert Path("fused").is_dir()


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_the_commands_of_the_guide(here, capsys):
    """Quick start, sequences, seeing and stopping, in this order: what one writes, the next reads."""
    (plan,) = (s.text for s in of("yaml", "recipes/guide/sequences.md"))
    small = workshop.small_plan(plan, here)
    (here / "plan.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    swept = {**small, "output_dir": "out/sweep", "sweep": {"methods": {"plain": [], "replay": small.pop("methods")}}}
    (here / "sweep.yaml").write_text(
        yaml.safe_dump({k: v for k, v in swept.items() if k != "methods"}), encoding="utf-8"
    )
    run_commands("recipes/guide/quickstart.md", here, capsys)
    run_commands("recipes/guide/sequences.md", here, capsys)
    done = here / "out" / "law-then-tickets"
    for name in ("plain", "replay", "new", "released"):
        shutil.copytree(done, here / "out" / name, dirs_exist_ok=True)
    for place, name in (("task-00-law", "task-00-old"), ("task-01-tickets", "task-01-new")):
        shutil.copytree(done / place, here / "out" / name)
    (gate,) = (s.text for s in of("yaml", "recipes/guide/watching.md"))
    (here / "gate.yaml").write_text(re.sub(r"gauges: .*", "", gate), encoding="utf-8")
    run_commands("recipes/guide/watching.md", here, capsys)
    assert (here / "report.html").is_file() and (here / "leaderboard.html").is_file()


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", ["recipes/guide/merging.md", "recipes/recall/README.md"])
def test_the_merges_of_a_page(page, here, capsys):
    (here / "merge.yaml").write_text("method: linear\nmodels: [law, tax]\n", encoding="utf-8")
    for snippet in of("commands", page):
        for line in commands(snippet):
            if line.startswith("hf-continual merge") and " ... " not in line:
                code, _, err = typed(workshop.small_line(line, here) + " --quiet", capsys)
                assert code == 0, (line, err)
                shutil.rmtree(here / "merged", ignore_errors=True)
