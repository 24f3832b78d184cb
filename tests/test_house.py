"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import hf_continual
from hf_continual.methods.table import TABLE

ROOT = Path(__file__).parents[1]
TOP = {
    "pyproject.toml",
    "hf_continual",
    "recipes",
    "notebooks",
    "tests",
    "model_cards",
    "README.md",
    "Makefile",
    "LICENSE",
}
RECIPES = sorted(
    p
    for p in (ROOT / "recipes").rglob("*.yaml")
    if p.parent.name not in ("accelerate", "baselines", "frontier", "proof", "sequence")
)
PLANS = sorted((ROOT / "recipes" / "sequence").glob("*.yaml"))


def test_the_top_level_is_what_was_agreed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP


def test_importing_the_package_loads_no_torch():
    code = "import sys, hf_continual; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_name_of_the_face_is_there_and_documented():
    for name in hf_continual.__all__:
        assert getattr(hf_continual, name).__doc__, name
    assert set(hf_continual.__all__) <= set(dir(hf_continual))
    with pytest.raises(AttributeError, match="it offers Task, TaskStream, train_stream"):
        hf_continual.Nothing  # noqa: B018


def test_other_versions_are_refused_with_a_sentence(monkeypatch):
    from hf_continual.versions import check_trl, check_versions

    real = metadata.version

    def found(name, version):
        monkeypatch.setattr(metadata, "version", lambda n: version if n == name else real(n))

    for name, version in (("transformers", "4.57.0"), ("peft", "0.10.0")):
        found(name, version)
        with pytest.raises(ImportError, match=rf"supports {name}\S+, and {name} {version} is installed.*pip install"):
            check_versions()
    for name, version in (("trl", "0.19.1"), ("transformers", "5.16.1"), ("peft", "0.20.0")):
        found(name, version)
        check_versions()  # TRL is asked for where it is used
        with pytest.raises(ImportError, match=rf"supports {name}\S+, and {name} {version} is installed.*pip install"):
            check_trl()

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(
        ImportError, match=r"trl is not installed: pip install .*\. In an environment .* ContinualCallback"
    ):
        check_trl()
    with pytest.raises(ImportError, match="transformers is not installed: pip install"):
        check_versions()


def test_files_can_be_held_in_the_head():
    long = {
        str(p.relative_to(ROOT)): n
        for p in (ROOT / "hf_continual").rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 300
    }
    assert not long


def test_no_import_loops_not_even_for_types():
    """Also under TYPE_CHECKING and inside functions: a reader can read a file's dependencies before it."""
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "hf_continual").rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    rests_on = {}
    for name, path in files.items():
        found = {
            module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module
            for module in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        }
        # The packages' own files only hold the public names, which refer to modules below them.
        rests_on[name] = {m for m in found if m in files and m != name and files[m].name != "__init__.py"}
    tuple(TopologicalSorter(rests_on).static_order())  # raises a CycleError that names the loop


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_recipes_take_two_steps(recipe, tmp_path, monkeypatch):
    from peft import LoraConfig

    from hf_continual import ContinualConfig, ContinualTrainer
    from tests import toy
    from tests.methods import covering

    monkeypatch.chdir(tmp_path)
    toy.rows("prompt_completion", seed=9).to_json("old_tasks.jsonl")
    toy.rows("prompt_completion", seed=9).to_json("memory.jsonl")
    toy.rows(seed=8).to_json("general.jsonl")
    fields = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    # A recipe's work before its first step may take hours; the method's test file shortens it.
    shorter = getattr(covering.module(recipe.parent.name), "SHORTER", {}) if fields.get("methods") else {}
    if shorter:
        fields["methods"][recipe.parent.name] |= shorter
    small = toy.settings(tmp_path / "out", max_steps=2)
    for key in ("learning_rate", "per_device_train_batch_size"):
        small.pop(key)
    config = ContinualConfig(**{**fields, **small})
    trainer = ContinualTrainer(
        toy.model(),
        config,
        train_dataset=toy.rows("prompt_completion"),
        processing_class=toy.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear") if recipe.stem == "lora" else None,
    )
    trainer.train()
    assert next(m.name for m in trainer.methods) == {"gauges": "gauge"}.get(recipe.parent.name, recipe.parent.name)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.stem)
def test_plans_run_on_the_toy_world(plan, tmp_path, monkeypatch):
    from hf_continual import train_stream
    from hf_continual.stream.read_plan import read_plan
    from tests import toy
    from tests.stream import world

    monkeypatch.chdir(tmp_path)
    small = world.make(tmp_path)
    rows = toy.rows("prompt_completion", number=8)
    (tmp_path / "data" / "longseq").mkdir(parents=True)
    listed = [
        {**row, "prompt": f"Which? Choose one from the option. Option: w1, w2.\n{row['prompt']}\nw9"} for row in rows
    ]
    for task in ("dbpedia", "amazon", "yahoo", "agnews"):
        for split in ("train", "test"):
            rows.from_list(listed).to_json(f"data/longseq/{task}.{split}.jsonl")
    toy.rows().to_json("general.jsonl")
    toy.rows().to_json("data/general.heldout.jsonl")
    for split in ("train", "test"):
        rows.to_json(f"law.{split}.jsonl")
    toy.rows("messages").to_json("chat.jsonl")
    rows.from_list([{"subject": "w1", "body": r["prompt"], "team": r["completion"].strip()} for r in rows]).to_csv(
        "tickets.csv"
    )
    read, _ = read_plan(plan)
    peft = {**(read.peft or {}), "r": 2}
    sweep = None if read.sweep is None else {**read.sweep.model_dump(), "seeds": [0]}
    result = train_stream(plan, model=small["model"], peft=peft, sft={**small["sft"], "max_steps": 2}, sweep=sweep)
    assert result.results.get("complete", True) and len(result.matrix.scores) in (2, 4)
    assert (tmp_path / read.output_dir / "continual_results.json").is_file()


def test_every_system_of_the_papers_is_an_arm_of_the_baselines(tmp_path):
    """Read, not trained: each method of the table trains in its own recipe's test."""
    from hf_continual.methods.table import TABLE
    from hf_continual.stream.arms import arms_of
    from hf_continual.stream.read_plan import read_plan

    plan, where = read_plan(
        ROOT / "recipes" / "baselines" / "sweep.yaml", ["data=" + str(ROOT / "recipes/data/longseq")]
    )
    arms = {name: arm for name, arm, _ in arms_of(plan, where)}
    used = {next(iter(m)) if isinstance(m, dict) else m for arm in arms.values() for m in arm.methods or ()}
    frontier, _ = read_plan(
        ROOT / "recipes" / "frontier" / "sweep.yaml", ["data=" + str(ROOT / "recipes/data/longseq")]
    )
    own = {
        next(iter(m)) if isinstance(m, dict) else m for arm in frontier.sweep.arms.values() for m in arm.methods or ()
    }
    # None of the papers has them. What needs a second task is not in recipes/frontier.
    later = own - {"recadam"} | {"on_policy_replay", "slao", "slow_weights"}
    assert own >= {"mask_surprising", "entropy_weighted", "kl_to_base", "mofo", "osft"}
    assert used >= set(TABLE) - later - {"gere", "freeze", "kif"}, "those three are compared in recipes of their papers"
    assert arms["sequential"].methods is None and len(arms) == len(plan.sweep.arms)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_configurations_are_read(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 2
    assert config.distributed_type == ("FSDP" if name == "fsdp2" else "MULTI_GPU")


def test_the_command_line(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "hf_continual", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    helped = run("--help")
    assert helped.returncode == 0 and "demo" in helped.stdout and "methods" in helped.stdout
    listed = run("methods")
    assert listed.returncode == 0 and all(name in listed.stdout for name in TABLE)
    assert hf_continual.__version__ in run("--version").stdout
    wrong = run("demo", "--model", str(tmp_path / "gone"))
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr


def test_every_module_imports():
    for path in (ROOT / "hf_continual").rglob("*.py"):
        if path.name != "__main__.py":
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("hf_continual.tensors.recadam", "hf_continual.methods.recadam", "RecAdamOptimizer"),
        ("hf_continual.tensors.recadam", "hf_continual.methods.recadam", "recall_share"),
        ("hf_continual.tensors.flat_adam", "hf_continual.methods.kif.flat_adam", "FlatAdam"),
        ("hf_continual.merging.linear", "hf_continual.merging.methods.linear", "merge_linear"),
        ("hf_continual.merging.interpolate", "hf_continual.merging.methods.interpolate", "interpolate"),
        ("hf_continual.merging.task_arithmetic", "hf_continual.merging.methods.task_arithmetic", "task_arithmetic"),
    ],
)
def test_former_places_still_give_the_same_object(old, new, name):
    with pytest.warns(DeprecationWarning, match=f"is now {new}"):
        found = getattr(importlib.import_module(old), name)
    assert found is getattr(importlib.import_module(new), name)
