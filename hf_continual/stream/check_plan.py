"""Check a plan as far as possible without importing torch: names, numbers, paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.inference.names import METHODS
from hf_continual.methods.table import check_description
from hf_continual.named import did_you_mean
from hf_continual.option_names import PEFT_CONFIGS, SFT_CONFIG, option_names
from hf_continual.paths import cannot_hold, check_is_there, check_rows_there
from hf_continual.stream.arms import arms_of
from hf_continual.stream.check_joint import check_joint
from hf_continual.stream.plan import Plan
from hf_continual.stream.plan_lines import Key, Where
from hf_continual.training_numbers import check_numbers

# Options of ContinualConfig that a plan may set for its tasks.
OURS = ("fresh_methods", "gauges", "stop_if", "rollback_if", "keep_best", "stop_when")
# Options that a plan sets itself, and where.
PLANS_OWN = ("output_dir", "seed", "data_seed", "push_to_hub", "resume_from_checkpoint")


def check_plan(plan: Plan, where: Where) -> None:
    """Check everything of a plan that needs no library.

    Args:
        plan: As read.
        where: Places of its entries.

    Raises:
        PlanError: If something cannot be used; names the place.
    """
    _check_tasks(plan, where)
    _check_options(plan, where)
    _check_methods(plan, where)
    _check_own_modules(plan, where)
    _check_paths(plan, where)
    if plan.joint:
        check_joint(plan, where)
    if plan.sweep and plan.sweep.arms:
        if plan.sweep.methods is not None:
            raise where.error(
                ("sweep", "arms"), "the sweep gives both methods and arms. Keep one: arms may have methods too."
            )
        for _, arm, its in arms_of(plan, where):
            check_plan(arm, its)
    if plan.memory == "forbidden" or plan.joint or _asks_for_kept(plan):
        from hf_continual.stream.past_rows import check_memory  # imports datasets

        check_memory(plan, where)


def _check_tasks(plan: Plan, where: Where) -> None:
    """Check names that must be tasks with test rows."""
    names = [task.name for task in plan.tasks]
    asked: list[tuple[tuple[Key, ...], str]] = []
    if isinstance(plan.evaluation.tasks, list):
        asked += [(("evaluation", "tasks", i), name) for i, name in enumerate(plan.evaluation.tasks)]
    for i, task in enumerate(plan.tasks):
        asked += [(("tasks", i, "evaluate", k), name) for k, name in enumerate(task.evaluate)]
    tested = {task.name for task in plan.tasks if task.test is not None}
    for path, name in asked:
        if name not in names:
            hint = did_you_mean(name, names)
            raise where.error(
                path,
                f"task {name!r} should be evaluated but is not defined.{hint} The plan's tasks are {', '.join(names)}.",
            )
        if name not in tested:
            raise where.error(path, f"task {name!r} should be evaluated but has no test rows. Give it `test:`.")


def _check_options(plan: Plan, where: Where) -> None:
    """Check options of SFTConfig and LoraConfig, and numbers with which nothing would be trained."""
    sft = {**option_names(SFT_CONFIG), **dict.fromkeys(OURS, False)}
    kind = (plan.peft or {}).get("peft_type", "LORA")
    if kind not in PEFT_CONFIGS:
        hint = did_you_mean(kind, PEFT_CONFIGS)
        raise where.error(
            ("peft", "peft_type"), f"a plan cannot add a {kind!r}.{hint} Known are {', '.join(PEFT_CONFIGS)}."
        )
    config = PEFT_CONFIGS[kind]
    for label, options, owner, known in [
        (("sft",), plan.sft, "SFTConfig", sft),
        (("peft",), plan.peft or {}, config.partition(":")[2], option_names(config)),
        *[(("tasks", i, "sft"), task.sft, "SFTConfig", sft) for i, task in enumerate(plan.tasks)],
    ]:
        for key in options:
            if key not in known:
                raise where.error((*label, key), f"{owner} has no option {key!r}.{did_you_mean(key, known)}")
            if owner == "SFTConfig" and key in PLANS_OWN:
                raise where.error(
                    (*label, key), f"{key!r} is set by the plan: write `output_dir` and `seed` at the top of the plan."
                )
    for i, task in enumerate(plan.tasks):
        if problem := check_numbers({**plan.sft, **task.sft}):
            name, sentence = problem
            raise where.error((("tasks", i, "sft", name) if name in task.sft else ("sft", name)), sentence)


def _check_methods(plan: Plan, where: Where) -> None:
    for path, methods in described_methods(plan):
        try:
            check_description(methods)
        except (TypeError, ValueError) as error:
            raise where.error(path, str(error)) from error


def _check_own_modules(plan: Plan, where: Where) -> None:
    """Refuse what cannot go with a method that supplies its own modules."""
    for path, methods in described_methods(plan):
        for name in sorted(set(_names_in(methods)) & set(METHODS)):
            said = f"the method {name!r} supplies the modules that it trains"
            if plan.peft is not None:
                raise where.error(
                    ("peft",), f"{said}, but peft asks for others. Leave peft out, or {name} ({where.of(path)})."
                )
            if plan.between_tasks == "new_adapter":
                raise where.error(
                    ("between_tasks",), f"{said} and trains them further in each task. Say between_tasks: continue."
                )
            if plan.merge is not None:
                raise where.error(
                    ("between_tasks",),
                    f"{said}, which choose for each row and cannot be merged. Say between_tasks: continue.",
                )


def bring_modules(plan: Plan) -> bool:
    """Whether one of a plan's methods supplies its own modules."""
    return any(set(_names_in(methods)) & set(METHODS) for _, methods in described_methods(plan))


def _names_in(description: Any) -> list[str]:
    """Names of the methods in a description of methods."""
    if isinstance(description, str):
        return [description]
    if isinstance(description, Mapping):
        return [str(name) for name in description]
    return [n for item in description for n in _names_in(item)] if isinstance(description, Sequence) else []


def described_methods(plan: Plan) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """Every entry of a plan that describes methods, with its place."""
    yield ("methods",), plan.methods
    for i, task in enumerate(plan.tasks):
        yield ("tasks", i, "methods"), task.methods
    for arm, methods in ((plan.sweep.methods if plan.sweep else None) or {}).items():
        yield ("sweep", "methods", arm), methods


def _asks_for_kept(plan: Plan) -> bool:
    return any("kept" in str(methods) for _, methods in described_methods(plan))


def _check_paths(plan: Plan, where: Where) -> None:
    """Check that files exist and that the output folder can be written."""
    for key in ("path", "tokenizer"):
        if (source := getattr(plan.model, key)) is not None:
            try:
                check_is_there(source, "the model" if key == "path" else "the tokenizer")
            except FileNotFoundError as error:
                place: tuple[Key, ...] = ("model", key)
                known = place in where.lines or place in where.overridden
                raise where.error(place if known else ("model",), str(error)) from error
    for i, task in enumerate(plan.tasks):
        for key in ("train", "test"):
            _check_rows(getattr(task, key), ("tasks", i, key), where)
    for path, methods in described_methods(plan):
        for place, source in _files_of(methods, path):
            _check_rows(source, place, where)
    if problem := cannot_hold(Path(plan.output_dir)):
        raise where.error(("output_dir",), f"{problem}. Choose another output_dir.")


def _check_rows(source: Any, path: tuple[Key, ...], where: Where) -> None:
    if isinstance(source, str):
        try:
            check_rows_there(source, "the rows")
        except FileNotFoundError as error:
            raise where.error(path, str(error)) from error


def _files_of(description: Any, path: tuple[Key, ...]) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """Values of `rows` and `memory` in a description of methods, with their places."""
    if isinstance(description, Sequence) and not isinstance(description, str):
        for i, item in enumerate(description):
            yield from _files_of(item, (*path, i))
    elif isinstance(description, Mapping):
        for name, options in description.items():
            for key in ("rows", "memory"):
                if isinstance(options, Mapping) and key in options:
                    yield (*path, name, key), options[key]
