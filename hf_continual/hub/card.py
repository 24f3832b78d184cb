"""The model card: facts in, text out. No model, no network, no clock; the same facts give the same text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2

from hf_continual.best_plain import sentence
from hf_continual.hub import tables
from hf_continual.hub.card_training import method_text, settings_table, tracking
from hf_continual.hub.card_yaml import dump_metadata
from hf_continual.hub.facts import CONFIG, CardFacts
from hf_continual.hub.folder_facts import read_facts
from hf_continual.hub.metadata import card_metadata
from hf_continual.hub.summary import summary
from hf_continual.hub.text import GENERATED, KEEP, KEEP_END, foreign_metadata, kept_text, safe
from hf_continual.inference.names import NAMES
from hf_continual.versions import VERSION

LIBRARY_BIBTEX = "@software{hf_continual,\n  title = {{hf_continual}},\n  note = {version VERSION}\n}"


def render_card(
    facts: CardFacts | str | os.PathLike[str],
    existing: str | None = None,
    *,
    repo_id: str | None = None,
) -> str:
    """Render a model card in which every figure comes from a measurement.

    Example:
        >>> text = render_card("out/task-02-tickets", repo_id="me/three-tasks")

    Args:
        facts: The facts, or a folder that holds them (``continual_config.json``, ``continual_results.json``).
        existing: The card that it replaces: text between the keep marks and foreign metadata stay.
        repo_id: Where the model is, or will be, published.

    Returns:
        The card.

    Raises:
        FileNotFoundError: If the folder holds no facts.
    """
    if not isinstance(facts, CardFacts):
        folder = Path(facts)
        facts = read_facts(folder)
        if existing is None and (folder / "README.md").is_file():
            existing = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    if repo_id is not None:
        from dataclasses import replace

        facts = replace(facts, repo_id=repo_id)
    metadata = card_metadata(facts)
    metadata |= foreign_metadata(existing, metadata)
    head = dump_metadata(metadata)
    return f"---\n{head}---\n\n{_body(facts, kept_text(existing))}"


def _body(facts: CardFacts, kept: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_continual.hub"), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    evaluation = facts.evaluation
    values: dict[str, Any] = {
        "title": (facts.repo_id or facts.name).split("/")[-1],
        "generated": GENERATED,
        "version": facts.versions.get("hf-continual", VERSION),
        "summary": summary(facts),
        "snippet": snippet(facts),
        "tasks": facts.tasks,
        "sequence": tables.sequence_table(facts) if facts.tasks else "",
        "merge": facts.merge,
        "merge_text": _merge_text(facts),
        "merge_inputs": _merge_inputs(facts),
        "method_text": method_text(facts),
        "settings_table": settings_table(facts),
        "tracking": tracking(facts),
        "learned": _learned(facts),
        "matrix_table": tables.matrix_table(evaluation) if evaluation.matrix else "",
        "protocol": tables.protocol(evaluation),
        "statuses": tables.statuses(evaluation),
        "figures_table": tables.figures_table(evaluation),
        "curves": _curves(facts),
        "gauges_table": tables.gauges_table(evaluation),
        "weights_text": _weights_text(facts),
        "limits": limits(facts),
        "keep": KEEP,
        "kept": kept,
        "keep_end": KEEP_END,
        "license_text": _license_text(facts),
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items() if version),
        "bibtex": "\n\n".join([LIBRARY_BIBTEX.replace("VERSION", VERSION), *(p.bibtex for p in facts.papers)]),
    }
    return environment.get_template("card.md.jinja").render(values).strip() + "\n"


def snippet(facts: CardFacts) -> str:
    """Code that loads the model by its id and runs as written."""
    model_id = facts.repo_id or facts.name
    cls, package = (
        ("AutoPeftModelForCausalLM", "peft") if facts.kind == "adapter" else ("AutoModelForCausalLM", "transformers")
    )
    imports = (
        f"from {package} import {cls}\nfrom transformers import AutoTokenizer"
        if facts.kind == "adapter"
        else "from transformers import AutoModelForCausalLM, AutoTokenizer"
    )
    if (kind := facts.adapter.get("kind")) is not None:
        cls = f"{NAMES[kind].loader}"
        imports = f"from hf_continual import {cls}\nfrom transformers import AutoTokenizer"
    load = cls if kind is not None else f"{cls}.from_pretrained"
    if facts.chat:
        ask = (
            'messages = [{"role": "user", "content": "Hello!"}]\n'
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)'
        )
    else:
        ask = 'inputs = tokenizer("Hello!", return_tensors="pt", return_token_type_ids=False)'
    return (
        f'{imports}\n\ntokenizer = AutoTokenizer.from_pretrained("{model_id}")\n'
        f'model = {load}("{model_id}")\n'
        f"{ask}\noutputs = model.generate(**inputs, max_new_tokens=32, do_sample=False)\n"
        f'print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    )


def _merge_text(facts: CardFacts) -> str:
    merge = facts.merge
    if merge is None:
        return ""
    paper = f" ([{merge.paper.title}]({merge.paper.url}))" if merge.paper and merge.paper.url else ""
    lines = [f"Merged by {merge.method}{paper}. Inputs, oldest first:"]
    return "\n".join(lines)


def _merge_inputs(facts: CardFacts) -> str:
    merge = facts.merge
    if merge is None:
        return ""
    text = "\n".join(f"- {ref.shown}" for ref in merge.inputs)
    if merge.options:
        text += f"\n\nOptions: {tables.options_text(safe(dict(merge.options)))}."
    if merge.call:
        text += f"\n\n```python\n{merge.call}\n```"
    if merge.report:
        text += f"\n\nThe full report, with checksums of the inputs, is in [{merge.report}]({merge.report})."
    return text + "".join(f"\n\n{note}" for note in merge.notes)


def _learned(facts: CardFacts) -> str:
    """The method state that comes with the model for the next task, and how to train with it."""
    if not facts.learned:
        return ""
    rows = [[f"**{k.name}**", k.what or k.kind, f"{k.tensors:,}", f"{k.size:,}"] for k in facts.learned]
    names = [k.name for k in facts.learned]
    classes = ", ".join(dict.fromkeys(f'"{k.kind}"' if ":" in k.kind else k.kind for k in facts.learned))
    model_id = facts.repo_id or facts.name
    return "\n\n".join(
        [
            "The next task can be trained with the state that the methods kept; it is in `continual`, and holds no rows of data.",
            tables.table(["method", "what it kept", "tensors", "bytes"], rows),
            f"A run with the methods {', '.join(names)} ({classes}) that starts from this model loads it:",
            f'```python\nfrom hf_continual import ContinualTrainer\n\ntrainer = ContinualTrainer("{model_id}", train_dataset=rows, '
            f"methods=methods)\n```",
            "To start without it: `ContinualConfig(fresh_methods=True)`.",
        ]
    )


def _curves(facts: CardFacts) -> str:
    image = facts.plots.get("forgetting")
    if image is None:
        return ""
    lost = facts.evaluation.figures["forgetting"]
    words = "Score of each task after every stage" + (
        f"; mean forgetting {tables.number(lost)}" if lost is not None else ""
    )
    return f"![{words}]({image})"


def _weights_text(facts: CardFacts) -> str:
    merge = facts.merge
    if merge is None or (merge.image is None and not merge.weights):
        return ""
    parts = [f"![Weight of each input in each layer]({merge.image})"] if merge.image else []
    if merge.weights:
        names = [ref.hub_id or ref.name or f"model {i}" for i, ref in enumerate(merge.inputs)]
        spans = []
        for i, name in enumerate(names):
            column = [w[i] for w in merge.weights.values()]
            spans.append(
                [name, tables.number(min(column)), tables.number(sum(column) / len(column)), tables.number(max(column))]
            )
        parts.append(tables.table(["input", "lowest weight", "mean weight", "highest weight"], spans))
        parts.append(f"Over {len(merge.weights)} groups of layers; all weights are in [{CONFIG}]({CONFIG}).")
    return "\n\n".join(parts)


def limits(facts: CardFacts) -> str:
    """Sentences that follow from the facts: what dropped most, what was not measured, what it was not made for."""
    evaluation, lines = facts.evaluation, []
    if evaluation.matrix and evaluation.row_names is None:
        matrix = evaluation.accuracy
        drops = {
            task: change
            for j, task in enumerate(evaluation.tasks[: matrix.last])
            if (change := matrix.gain(matrix.score(matrix.last, j), matrix.score(j, j))) is not None and change < 0
        }
        if drops:
            worst = sorted(drops, key=lambda name: drops[name])[:3]
            lines.append(
                "- Lost since they were learned: " + ", ".join(f"{t} {tables.signed(drops[t])}" for t in worst) + "."
            )
    scored = {
        t
        for t, v in zip(evaluation.tasks, evaluation.matrix[-1] if evaluation.matrix else [], strict=False)
        if v is not None
    }
    if missing := [t.name for t in facts.tasks if t.name not in scored]:
        lines.append(f"- Not scored after the last stage (NOT_RUN): {', '.join(missing)}.")
    if evaluation.matrix and evaluation.base_row is None:
        lines.append("- The base model was not scored, so forward transfer is unknown.")
    if worse := [tables.change_text(g) for g in evaluation.gauges if g.worse]:
        lines.append(f"- Worse than the base model outside its tasks: {'; '.join(worse)}.")
    if unknown := [g.name for g in evaluation.gauges if g.status == "MEASURED" and g.base is None]:
        lines.append(f"- Whether {', '.join(unknown)} changed is unknown: the base model was not measured.")
    if not any(g.status == "MEASURED" for g in evaluation.gauges):
        lines.append("- General abilities were not measured: what it forgot outside its tasks is unknown.")
    if evaluation.rows and (least := min(evaluation.rows.values())) < 500:
        lines.append(
            f"- The scores are based on as few as {least} rows per task: differences of a few points may be chance."
        )
    if evaluation.best_plain is not None:
        lines.append(f"- Of its sweep, {sentence(safe(evaluation.best_plain), evaluation.lower_is_better)}.")
    if not facts.languages:
        lines.append("- The languages of the training rows were not stated.")
    scored_on = "The scores are on rows of its own tasks; n" if evaluation.matrix else "N"
    lines.append(f"- {scored_on}othing is known about safety, bias or other uses.")
    return "\n".join(lines)


def _license_text(facts: CardFacts) -> str:
    if facts.license is None:
        return f"Not stated: {facts.license_reason or 'the licence of the base model is unknown'}. Ask the author before using it."
    name = facts.license_name or facts.license
    shown = f"[{name}]({facts.license_link})" if facts.license_link else name
    return f"{shown}, {facts.license_reason or 'chosen by the author'}. The datasets keep their own terms."
