"""The cards of the reference recipes, and of recorded runs: ``python -m tests.hub.cards`` (`make cards`) rewrites them.

A recipe states a method and settings, but nothing was measured with it: its card says NOT_RUN. The facts in
``recorded/`` are those of runs on the toy world (a random model of 4 layers), as the library wrote them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from hf_continual import ContinualConfig, render_card
from hf_continual.hub.facts import CardFacts, MethodFacts, TaskFacts
from hf_continual.hub.folder_facts import evaluation_from, facts_from
from hf_continual.hub.refs import ModelRef
from hf_continual.inference.names import METHODS
from hf_continual.methods.base import Method
from hf_continual.methods.table import build_methods, method_class
from hf_continual.trainer.facts import settings_of, trl_tags

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUT = ROOT / "model_cards"
BASE = ModelRef("Qwen/Qwen2.5-0.5B")


def recipe_facts(recipe: Path) -> CardFacts:
    """The facts of a recipe about a model trained with it."""
    fields = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    methods = fields.pop("methods")
    named = {k: v for m in (methods if isinstance(methods, list) else [methods]) for k, v in m.items()}
    config = ContinualConfig(**{"output_dir": "out", "use_cpu": True, "bf16": False, **fields})
    adapter, own = recipe.stem != "full", bool(set(named) & set(METHODS))
    return CardFacts(
        f"{recipe.parent.name}-{recipe.stem}",
        repo_id=f"me/{recipe.parent.name}-{recipe.stem}",
        kind="adapter" if adapter else "model",
        base=BASE,
        tasks=(TaskFacts("new-task", started_from=BASE),),
        methods=tuple(MethodFacts(name, options or {}, method_class(name).paper) for name, options in named.items()),
        settings=settings_of(config),
        adapter=next((adapter_facts_of(m) for m in build_methods(methods) if m.adapter() is not None), {})
        if own
        else {},
        tags=trl_tags(),
        chat=True,
    )


def adapter_facts_of(method: Method) -> dict[str, Any]:
    """What a method's own modules are."""
    config = method.adapter()
    return {"kind": str(config.peft_type), **config.sizes}


def cards() -> dict[str, str]:
    """Text by file name."""
    made = {}
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        fields = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        if "methods" not in fields or "tasks" in fields:  # what accelerate reads, plans, and parts of plans
            continue
        facts = recipe_facts(recipe)
        made[f"{facts.name}.md"] = render_card(facts, "")
    for file in sorted((HERE / "recorded").glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        facts = replace(
            facts_from(data["config"]),
            evaluation=evaluation_from(data["results"]),
            repo_id=f"me/{file.stem}",
            versions={},
        )
        made[f"{file.stem}.md"] = render_card(facts, "")
    return made


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, text in cards().items():
        (OUT / name).write_text(text, encoding="utf-8")
