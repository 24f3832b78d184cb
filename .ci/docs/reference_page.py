"""The reference of the public names."""

from __future__ import annotations

import inspect
from typing import Any

import hf_continual
from hf_continual.methods.table import TABLE, method_class

# Every public name that is not a method of the table is in one of these groups.
GROUPS = {
    "Training": ("ContinualTrainer", "ContinualConfig", "Stopped"),
    "Task sequences": ("Task", "TaskStream", "train_stream", "AccuracyMatrix"),
    "Methods of your own": ("Method", "Forward", "Run", "OptimizerChoice", "Paper", "ReplayRows", "ReplayCollator"),
    "Loading": ("load_prompt_pool", "load_moe_lora", "load_sapt_lora"),
    "Publishing": ("push_to_hub", "render_card", "HubPushError"),
}


def where(name: str) -> str:
    """The path of a public name's definition."""
    found: Any = getattr(hf_continual, name)
    return f"{found.__module__}.{found.__qualname__}"


def method_names() -> dict[str, str]:
    """The classes of the table of methods: class -> name in the table."""
    return {method_class(name).__name__: name for name in TABLE}


def groups() -> dict[str, list[str]]:
    """All public names but methods; those that are in no group are ways of merging, or come last."""
    found = {title: [n for n in names if n in hf_continual.__all__] for title, names in GROUPS.items()}
    named = {name for names in found.values() for name in names} | set(method_names())
    rest = [name for name in hf_continual.__all__ if name not in named]
    merging = [name for name in rest if where(name).startswith("hf_continual.merging")]
    found["Merging"] = merging
    found["More"] = [name for name in rest if name not in merging]
    return {title: names for title, names in found.items() if names}


def reference_page() -> str:
    """The page."""
    parts = ["# Reference", "", "`from hf_continual import ...`. Each name is imported when it is first used.", ""]
    parts += ["| for | names |", "|---|---|"]
    for title, names in groups().items():
        parts.append(f"| {title} | {', '.join(f'[`{name}`][{where(name)}]' for name in names)} |")
    listed = (f"[`{cls}`][{where(cls)}]" for cls in method_names() if cls in hf_continual.__all__)
    parts.append(f"| Methods | {', '.join(listed)} |")
    for title, names in groups().items():
        parts += ["", f"## {title}"]
        for name in names:
            parts += ["", f"::: {where(name)}", *options(getattr(hf_continual, name))]
    return "\n".join(parts) + "\n"


def options(found: Any) -> list[str]:
    """How mkdocstrings shows a name: with its public members if it is a protocol or a small class."""
    members = inspect.isclass(found) and found.__name__ in ("Method", "Forward", "Run", "AccuracyMatrix", "Paper")
    return [
        "    options:",
        f"      members: {'null' if members else 'false'}",
        "      show_root_heading: true",
        "      heading_level: 3",
    ]
