"""The part of a card about how a model was trained."""

from __future__ import annotations

from hf_continual.hub import tables
from hf_continual.hub.facts import CONFIG, CardFacts
from hf_continual.hub.text import safe
from hf_continual.inference.names import NAMES


def method_text(facts: CardFacts) -> str:
    """The methods, the adapter and the last stage, as a list."""
    lines = []
    for method in facts.methods:
        paper = method.paper
        where = f" ([{paper.title}]({paper.url}))" if paper and paper.url else f" ({paper.title})" if paper else ""
        options = tables.options_text(safe(dict(method.options)))
        lines.append(f"- **{method.name}**{where}: {options or 'defaults'}")
    if facts.training == "joint":
        lines.append(
            "Joint training: the rows of all tasks in one run, the upper bound for learning them one after another."
        )
    elif not lines and facts.merge is None:
        lines.append("No method against forgetting: plain sequential fine-tuning.")
    if facts.adapter:
        shown = {k: v for k, v in facts.adapter.items() if k not in ("quantization", "kind", "peft")}
        lines.append(f"- {kind_title(facts) or facts.adapter.get('peft', 'LoRA')}: {tables.options_text(shown)}")
        if quantization := facts.adapter.get("quantization"):
            lines.append(f"- The base was quantised during training: {tables.options_text(quantization)}")
    run = []
    if facts.steps is not None:
        run.append(f"{facts.steps:,} optimizer steps")
    if facts.seed is not None:
        run.append(f"seed {facts.seed}")
    if facts.hardware:
        run.append(facts.hardware)
    if facts.seconds is not None:
        run.append(f"{facts.seconds:.0f} s of training")
    if run:
        lines.append(f"\nLast stage: {', '.join(run)}.")
    lines += [f"\nA rule ended or changed it: {safe(reason).replace('|', '/')}." for reason in facts.ended]
    lines.append(f"{chr(10) if lines else ''}All settings are in [{CONFIG}]({CONFIG}).")
    return "\n".join(lines)


def kind_title(facts: CardFacts) -> str | None:
    """What an adapter that changes inference is called; None for LoRA and full models."""
    kind = facts.adapter.get("kind")
    return None if kind is None else NAMES[kind].title.split(" ", 1)[1]


def settings_table(facts: CardFacts) -> str:
    """Training arguments as a table; empty without any."""
    settings = safe(dict(facts.settings))
    return tables.table(["setting", "value"], [[k, tables.plain(v)] for k, v in settings.items()]) if settings else ""


BADGES = {
    "Weights & Biases": "https://raw.githubusercontent.com/wandb/assets/main/wandb-github-badge-28.svg",
    "Trackio": "https://raw.githubusercontent.com/gradio-app/trackio/refs/heads/main/trackio/assets/badge.png",
    "Comet": "https://raw.githubusercontent.com/comet-ml/comet-examples/master/logo/comet_badge.png",
}


def tracking(facts: CardFacts) -> str:
    """A badge for each page that shows the training, as in TRL's cards."""
    return "\n".join(
        f'[<img src="{BADGES[name]}" alt="Visualize in {name}" width="150" height="24"/>]({url})'
        for name, url in facts.tracking.items()
        if name in BADGES
    )
