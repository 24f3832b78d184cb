"""Bad plans give one clear error with file and line, before any weights are loaded."""

from __future__ import annotations

import json

import pytest
import yaml
from transformers import AutoModelForCausalLM

from hf_continual import train_stream
from hf_continual.stream.models import load_finished
from hf_continual.stream.plan_lines import PlanError, read_yaml
from hf_continual.stream.prepare import prepare
from hf_continual.stream.read_plan import read_plan
from tests import toy
from tests.stream import world


@pytest.fixture
def plan(tmp_path, monkeypatch):
    made = world.make(tmp_path)

    def loads(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
    return made


def change(plan, path, value):
    """Set an entry by its path; a list index of None appends."""
    at = plan
    for key in path[:-1]:
        at = at[key]
    if value is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = value


BAD = {
    "unknown key": (["evaluaton"], {}, "unknown key 'evaluaton'. Did you mean 'evaluation'?"),
    "unknown key of a task": (["tasks", 1, "trian"], "x", "unknown key 'trian'. Did you mean 'train'?"),
    "unknown key of evaluation": (["evaluation", "metrc"], "x", "unknown key 'metrc'. Did you mean 'metric'?"),
    "missing key": (["tasks", 1, "train"], KeyError, "the key 'train' is missing"),
    "wrong type": (["seed"], "one", "got 'one' (str): expected a valid integer"),
    "missing file": (["tasks", 1, "train"], "gone.jsonl", "'gone.jsonl' does not exist"),
    "missing test file": (["tasks", 2, "test"], "./gone", "'./gone' does not exist"),
    "no model": (["model"], "/nowhere/model", "model: "),
    "evaluated, not defined": (["evaluation", "tasks"], ["t0", "t7"], "task 't7' should be evaluated but is not defined. The plan's tasks are t0, t1, t2"),
    "evaluated after a task, not defined": (["tasks", 0, "evaluate"], ["x"], "task 'x' should be evaluated but is not defined"),
    "circular parents": (["tasks", 1, "parent"], "t2", "circular parents: t1 -> t2 -> t1"),
    "unknown parent": (["tasks", 1, "parent"], "t9", "continues from 't9', which is not a task"),
    "two of a name": (["tasks", 1, "name"], "t0", "two tasks are called 't0'"),
    "slash": (["tasks", 1, "name"], "a/b", "contain no '/'"),
    "wrong column": (["tasks", 0, "columns"], {"prompt": "question", "completion": "completion"}, "the column 'question', which the rows do not have"),
    "wrong column in a text": (["tasks", 0, "columns"], {"prompt": "{promt}?", "completion": "completion"}, "Did you mean 'prompt'?"),
    "columns of other names": (["tasks", 0, "columns"], {"prompts": "prompt", "completion": "completion"}, "needs the column 'prompt'"),
    "rows that cannot be scored": (["tasks", 0, "metric"], "multiple_choice", "needs the column 'context'"),
    "unknown metric": (["evaluation", "metric"], "exactmatch", "unknown metric 'exactmatch'. Did you mean 'exact_match'?"),
    "unknown option of a metric": (["evaluation", "metric"], {"generated": {"macth": "exact"}}, "no option 'macth'. Did you mean 'match'?"),
    "unknown SFT option": (["sft", "learning_rates"], 1.0, "SFTConfig has no option 'learning_rates'. Did you mean 'learning_rate'?"),
    "SFT option of the plan": (["sft", "output_dir"], "x", "'output_dir' is set by the plan"),
    "SFT option of a task": (["tasks", 2, "sft"], {"max_step": 1}, "Did you mean 'max_steps'?"),
    "bad SFT value": (["sft", "lr_scheduler_type"], "wavy", "wavy"),
    "unknown LoRA option": (["peft"], {"rank": 4}, "LoraConfig has no option 'rank'"),
    "unknown method": (["methods"], ["rply"], "Unknown method 'rply'"),
    "bad method option": (["methods"], [{"replay": {"rows": "earlier_tasks", "ratio": 2.0}}], "must lie between 0 and 1, both excluded"),
    "unknown between": (["between_tasks"], "stack", "expected 'continue' or 'new_adapter'"),
    "unknown key of a merge": (["between_tasks"], {"merge": {"functoin": "a:b"}}, "unknown key 'functoin'. Did you mean 'function'?"),
    "unknown benchmark": (["tasks", 0], {"benchmark": "standrd"}, "unknown benchmark 'standrd'"),
    "unknown order": (["tasks", 0], {"benchmark": "standard", "order": 9}, "order=9 is not one of the papers' orders 1, 2, 3"),
    "benchmark without files": (["tasks", 0], {"benchmark": "standard", "folder": "nowhere"}, "nowhere has no training rows of 'dbpedia'"),
    "gauge without rows": (["evaluation", "gauges"], {"general": {}}, "the gauge 'general' needs rows"),
    "gauge without text": (["evaluation", "gauges"], {"g": {"rows": [{"x": 1}]}}, "needs the column 'text'"),
    "gauge with a task's name": (["evaluation", "gauges"], {"t0": {"rows": [{"text": "x"}]}}, "has the name of a task"),
    "labels without columns": (["tasks", 0, "labels"], ["a"], "labels name the classes of a column"),
    "no options to drop": (["tasks", 0, "drop_options"], True, "no prompt has a sentence that lists options"),
    "prompts cut too short": (["tasks", 0, "max_prompt_tokens"], 1, "is less than the last line of a prompt takes"),
    "bad biography": (["tasks", 0, "train"], {"biography": {"people": 3}}, "unexpected keyword argument 'people'"),
    "unknown earlier task key": (["methods"], {"replay": {"rows": {"earlier_tasks": 3, "off": []}, "ratio": 0.1}}, "has no key 'off'"),
    "sweep without arms": (["sweep"], {"methods": {}}, "the sweep has no methods"),
    "sweep of an unknown task": (["sweep"], {"orders": {"a": ["t0", "t8"]}}, "task 't8' is not defined"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_plans_say_where_and_what(plan, tmp_path, case):
    path, value, message = BAD[case]
    change(plan, path, value)
    file = world.write(tmp_path, plan)
    with pytest.raises(PlanError) as refused:
        train_stream(file)
    said = str(refused.value)
    assert message in said, said
    assert said.startswith(f"{file}, line "), said
    line = int(said.removeprefix(f"{file}, line ").split(",")[0].split(":")[0])
    # The line is that of the entry, of something in it, or of the mapping that should hold it.
    about = {
        n
        for p, n in read_yaml(file)[1].lines.items()
        if p and (p[: len(path)] == tuple(path) or tuple(path[: len(p)]) == p)
    }
    assert line in about, f"line {line} is none of {about}"
    assert not list(tmp_path.glob("out/task-*"))


def test_lines_are_exact(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("model: m\noutput_dir: o\n\n# a comment\ntasks:\n  - name: a\n    train: t\n    trian: x\n")
    with pytest.raises(PlanError, match=rf"^{file}, line 8, tasks\[0\].trian: unknown key 'trian'"):
        read_plan(file)
    file.write_text("model: m\nseed: 1\nseed: 2\n")
    with pytest.raises(PlanError, match=r"line 3, seed: the key 'seed' is given twice"):
        read_plan(file)
    file.write_text("model: [m\n")
    with pytest.raises(PlanError, match=r"line \d, |line \d: not valid YAML"):
        read_plan(file)
    file.write_text("")
    with pytest.raises(PlanError, match="is empty"):
        read_plan(file)
    file.write_text("- a\n")
    with pytest.raises(PlanError, match="a plan is a mapping"):
        read_plan(file)
    with pytest.raises(FileNotFoundError, match="There is no plan"):
        read_plan(tmp_path / "gone.yaml")


def test_a_task_of_a_benchmark_is_traced_to_its_entry(tmp_path):
    for task in ("dbpedia", "amazon", "yahoo", "agnews"):
        for split in ("train", "test"):
            (tmp_path / f"{task}.{split}.jsonl").write_text('{"prompt": "w1", "completion": " w2"}\n')
    file = tmp_path / "plan.yaml"
    entries = [{"name": "own", "train": "x"}, {"benchmark": "standard", "folder": str(tmp_path), "train_rows": 5}]
    file.write_text(yaml.safe_dump({"model": "m", "output_dir": "o", "tasks": entries}))
    plan, where = read_plan(file)
    assert [t.name for t in plan.tasks] == ["own", "dbpedia", "amazon", "yahoo", "agnews"]
    assert {t.train_rows for t in plan.tasks[1:]} == {5}
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if "train_rows" in text)
    assert where.of(("tasks", 3, "train_rows")) == f"{file}, line {line}, tasks[3].train_rows"


def test_numbers_as_yaml_1_2_reads_them(tmp_path):
    file = tmp_path / "n.yaml"
    file.write_text("a: 1e-3\nb: 2E5\nc: 1.5e-3\nd: e-3\n")
    assert read_yaml(file)[0] == {"a": 1e-3, "b": 2e5, "c": 1.5e-3, "d": "e-3"}


HOSTILE = {
    "latin": ("model: caf\xe9\n".encode("latin-1"), r"line 1: the byte 0xe9 is not UTF-8\. Save the plan as UTF-8"),
    "utf16": ("model: a\n".encode("utf-16"), r"line 1: the byte 0xff is not UTF-8"),
    "nul": (b"model: a\0b\n", "special characters are not allowed"),
    "deep": (b"model: " + b"[" * 5000, "nested too deeply"),
    "number": (b"seed: 0x" + b"f" * 9 + b"\nmodel: !!int x\n", "cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_plan_that_cannot_be_read_is_named(tmp_path, name):
    content, said = HOSTILE[name]
    (tmp_path / "plan.yaml").write_bytes(content)
    with pytest.raises(PlanError, match=rf"plan\.yaml.*{said}"):
        read_plan(tmp_path / "plan.yaml")


DAMAGED = {
    "config.json": [b"", b"[]", b"{", b"\xff\xfe", b'{"a":' * 50_000, b'{"model_type": 3}'],
    "tokenizer.json": [b"garbage", b"[]", b"\xff", b"[" * 50_000, b"{}"],
    "tokenizer_config.json": [b"", b"7", b"\xff"],
    "model.safetensors": [b"", b"\xff" * 64],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_the_base_model_is_named(tmp_path, name):
    plan = world.make(tmp_path)
    whole = (tmp_path / "model" / name).read_bytes()
    for content in DAMAGED[name]:
        (tmp_path / "model" / name).write_bytes(content)
        with pytest.raises((ValueError, OSError), match=rf"{name}|/model cannot be loaded: \w+: ") as refused:
            prepared = prepare(*read_plan(plan))
            load_finished(prepared.plan, None)
        assert not isinstance(refused.value, json.JSONDecodeError | UnicodeError), refused.value
    (tmp_path / "model" / name).write_bytes(whole)
    load_finished(prepare(*read_plan(plan)).plan, None)


def test_two_names_that_are_one_file(tmp_path):
    plan = world.make(tmp_path)
    plan["tasks"][0]["name"], plan["tasks"][1]["name"] = "a b", "a-b"
    with pytest.raises(PlanError, match="'a b' and 'a-b' give the same file name"):
        prepare(*read_plan(plan))


def test_losses_and_scores_are_not_averaged(tmp_path):
    plan = world.make(tmp_path)
    plan["tasks"][1]["metric"] = "answer_nll"
    with pytest.raises(PlanError, match="'t1' is scored by a loss .* and 't0' is not.*as a gauge"):
        train_stream(plan)
    assert not list((tmp_path / "out").glob("task-*")), "met before anything is trained"


def test_exit_codes_of_run(tmp_path):
    from typer.testing import CliRunner

    from hf_continual.cli import app

    plan = world.make(tmp_path, sft={**world.SFT, "max_steps": 1})
    plan["tasks"] = plan["tasks"][:1]
    good = world.write(tmp_path, plan)

    def code(*words):
        return CliRunner().invoke(app, ["run", *map(str, words)]).exit_code

    assert code(good, "--dry-run") == 0 and not (tmp_path / "out").exists()
    assert code(good, "--quiet") == 0 and code(good, "--quiet") == 0
    assert code(tmp_path / "nope.yaml") != 0 and code(good, "--only", "nope") != 0
    (tmp_path / "out" / "plan.json").write_text("{")
    assert code(good) != 0
    (tmp_path / "model" / "config.json").write_text("[")
    assert code(good, "--dry-run", "--output-dir", tmp_path / "new") != 0
    (tmp_path / "t0.jsonl").write_text('{"prompt": 1}\n')
    assert code(good, "--dry-run", "--output-dir", tmp_path / "new") != 0


@pytest.mark.parametrize("metric", ["exact_match", "label_likelihood", {"generated": {"match": "exact"}}])
def test_conversations_are_scored_as_they_are(tmp_path, metric):
    described = world.make(tmp_path)
    toy.rows("messages", number=3).to_json(tmp_path / "chats.jsonl")
    for task in described["tasks"]:
        task["train"] = task["test"] = str(tmp_path / "chats.jsonl")
    described["evaluation"]["metric"] = metric
    plan = prepare(*read_plan(world.write(tmp_path, described)))
    scored = plan.scorers["t0"](toy.model(), plan.tokenizer, plan.stream[0].test)
    assert [r.reference for r in scored.rows] == [m[-1]["content"] for m in plan.stream[0].test["messages"]]


@pytest.mark.parametrize(
    "error", [KeyError("weight_map"), RecursionError("too deep"), Exception("of a library"), ValueError()]
)
def test_an_unexpected_error_is_one_message(monkeypatch, capsys, error):
    from hf_continual import cli

    def fails(app):
        raise error

    monkeypatch.setattr(type(cli.app), "__call__", fails)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(type(error).__name__) and "Traceback" not in said
